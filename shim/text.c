#include "text.h"

struct text text_over(char *buffer, size_t size) {
    buffer[0] = 0;
    return (struct text){.begin = buffer, .length = 0, .size = size, .truncated = 0};
}

void text_add(struct text *text, const char *string) {
    for (; *string; string++) {
        if (text->length + 1 >= text->size) {
            text->truncated = 1;
            return;
        }
        text->begin[text->length++] = *string;
        text->begin[text->length] = 0;
    }
}

void text_add_number(struct text *text, long number) {
    char digits[24];
    size_t at = sizeof digits - 1;
    unsigned long rest = number < 0 ? -(unsigned long)number : (unsigned long)number;

    digits[at] = 0;
    do {
        digits[--at] = (char)('0' + rest % 10);
        rest /= 10;
    } while (rest);
    if (number < 0)
        digits[--at] = '-';
    text_add(text, digits + at);
}

void text_add_hex(struct text *text, unsigned long number) {
    char digits[17];

    for (int at = 15; at >= 0; at--) {
        digits[at] = "0123456789abcdef"[number & 15];
        number >>= 4;
    }
    digits[16] = 0;
    text_add(text, digits);
}

size_t text_length(const char *string) {
    size_t length = 0;

    while (string[length])
        length++;
    return length;
}

int text_equal(const char *a, const char *b) {
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

const char *text_after(const char *string, const char *prefix) {
    while (*prefix) {
        if (*string++ != *prefix++)
            return NULL;
    }
    return string;
}
