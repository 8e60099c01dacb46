//! Keeps the allocator of glibc from holding on to what is no longer used.
//!
//! It gives each of the first sixteen threads or so an arena of its own, and what a thread has freed stays in its arena. Work
//! that takes time goes from thread to thread here, with buffers of megabytes: a backup of 30 MB/s then holds 150 MiB where it
//! uses 40. With few arenas the next thread takes what the last one freed. The allocator of musl, which the static program has,
//! gives memory back by itself.

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
