//! Keeps the allocator from holding on to what is no longer used.
//!
//! Work that takes time goes from thread to thread here, with buffers of megabytes. An allocator that gives each thread an arena
//! of its own, as glibc's does, keeps what a thread has freed in that thread's: a backup of 30 MB/s then holds 150 MiB where it
//! uses 40. And musl's makes a restore take five times as long. So it is jemalloc, with one arena that all threads share, and
//! what is free goes back to the system within a second; `.cargo/config.toml` has these settings, as they are compiled in.

#[global_allocator]
static JEMALLOC: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
