//! Keeps the allocator from holding on to what is no longer used.
//!
//! Work that takes time goes from thread to thread here, with buffers of megabytes. glibc gives each of the first sixteen threads
//! or so an arena of its own, and what a thread has freed stays in its arena: a backup of 30 MB/s then holds 150 MiB where it
//! uses 40. With one arena the next thread takes what the last one freed. The static program has jemalloc instead, likewise with
//! one arena (`.cargo/config.toml` has its settings): with the allocator of musl a restore takes five times as long.

#[cfg(target_env = "musl")]
#[global_allocator]
static JEMALLOC: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Arenas that all threads share.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 1;

/// To be called once, before there are threads.
#[cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "glibc has no other way to be told from within"))]
pub fn share_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers and touches no memory of ours; it must not run beside other threads, and there are none.
    let is_set = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    #[cfg(target_env = "gnu")]
    debug_assert_eq!(is_set, 1, "an old glibc: memory stays where it is");
}
