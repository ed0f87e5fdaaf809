/* Strings without libc, into buffers of fixed size. */
#ifndef FLOCKSHIM_TEXT_H
#define FLOCKSHIM_TEXT_H

#include <stddef.h>

struct text {
    char *begin;
    size_t length;
    size_t size;
    int truncated;
};

struct text text_over(char *buffer, size_t size);
void text_add(struct text *text, const char *string);
void text_add_number(struct text *text, long number);
void text_add_hex(struct text *text, unsigned long number);

size_t text_length(const char *string);
int text_equal(const char *a, const char *b);

/* What follows prefix in string, or NULL where string does not start so. */
const char *text_after(const char *string, const char *prefix);

#endif
