/* The compiler calls these for structure copies and zeroing even in freestanding code; hidden, so
 * that a program's own are never replaced. */
#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memset(void *to, int byte, size_t size);

void *memcpy(void *restrict to, const void *restrict from, size_t size) {
    char *out = to;
    const char *in = from;

    for (size_t i = 0; i < size; i++)
        out[i] = in[i];
    return to;
}

void *memset(void *to, int byte, size_t size) {
    char *out = to;

    for (size_t i = 0; i < size; i++)
        out[i] = (char)byte;
    return to;
}
