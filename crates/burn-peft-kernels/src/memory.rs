//! Where freed memory goes.

/// Asks the C library to keep freed memory for the next allocation, for the whole process.
///
/// A training step frees and allocates the same tensors over and over. glibc gives blocks of megabytes back to
/// the system and takes them again, page by page: of a LoRA step of MiniLM on two cores that is a third
/// (`docs/performance.md`). Programs that train call this once, when they start; a library does not. It
/// changes nothing on other C libraries.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // The largest that glibc takes: half of a heap. Larger blocks are mapped as before. What ends a heap is not
        // given back, however much it is: a step's activations may be gigabytes.
        const MAPPED_FROM: libc::c_int = 32 << 20;
        const NOTHING: libc::c_int = -1;
        // SAFETY: `mallopt` takes two numbers and locks the allocator itself.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, NOTHING);
        }
    }
}
