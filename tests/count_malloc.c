/* Preloaded in front of libc's allocator: counts the calls. */
#define _GNU_SOURCE
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);

static long calls;

long malloc_calls(void)
{
    return __atomic_load_n(&calls, __ATOMIC_SEQ_CST);
}

void *malloc(size_t size)
{
    __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
    return __libc_calloc(n, size);
}

void *realloc(void *old, size_t size)
{
    __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
    return __libc_realloc(old, size);
}
