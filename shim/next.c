/* What dlsym(RTLD_NEXT) does; before glibc 2.34 that is in a library which not every program has.
 * Once and early: later there may be other threads, and no lock that a fork cannot leave locked. */
#include <elf.h>
#include <link.h>
#include <stddef.h>
#include <stdint.h>

#include "next.h"
#include "text.h"

#define HIDDEN_VERSION 0x8000

extern int dl_iterate_phdr(int (*)(struct dl_phdr_info *, size_t, void *), void *)
    __attribute__((weak));

static void *found[NEXT_COUNT];
static int have_searched;

static const char *const names[NEXT_COUNT] = {"execve",       "execv", "execvp",  "posix_spawn",
                                              "posix_spawnp", "fcntl", "fcntl64", "recv"};

struct symbols {
    uintptr_t base;
    const Elf64_Sym *table;
    const char *names;
    const uint16_t *versions; /* NULL where there are none */
    const uint32_t *hashes;   /* DT_GNU_HASH */
};

static int is_ours(const struct dl_phdr_info *object) {
    const uintptr_t here = (uintptr_t)found - object->dlpi_addr;

    for (int i = 0; i < object->dlpi_phnum; i++) {
        const Elf64_Phdr *segment = object->dlpi_phdr + i;

        if (segment->p_type == PT_LOAD && here - segment->p_vaddr < segment->p_memsz)
            return 1;
    }
    return 0;
}

/* glibc has added the base already, musl and the kernel's own object have not. */
static const void *address(const struct symbols *symbols, uintptr_t value) {
    return (const void *)(value < symbols->base ? value + symbols->base : value);
}

static int find_symbols(const struct dl_phdr_info *object, struct symbols *symbols) {
    const Elf64_Dyn *entry = NULL;

    *symbols = (struct symbols){.base = object->dlpi_addr};
    for (int i = 0; i < object->dlpi_phnum; i++) {
        if (object->dlpi_phdr[i].p_type == PT_DYNAMIC)
            entry = (const Elf64_Dyn *)(object->dlpi_addr + object->dlpi_phdr[i].p_vaddr);
    }
    for (; entry && entry->d_tag != DT_NULL; entry++) {
        const void *at = address(symbols, entry->d_un.d_ptr);

        if (entry->d_tag == DT_SYMTAB)
            symbols->table = at;
        else if (entry->d_tag == DT_STRTAB)
            symbols->names = at;
        else if (entry->d_tag == DT_VERSYM)
            symbols->versions = at;
        else if (entry->d_tag == DT_GNU_HASH)
            symbols->hashes = at;
    }
    return symbols->table && symbols->names && symbols->hashes;
}

static uint32_t hash(const char *name) {
    uint32_t sum = 5381;

    for (; *name; name++)
        sum = sum * 33 + (unsigned char)*name;
    return sum;
}

static int is_definition(const struct symbols *symbols, uint32_t index, const char *name) {
    const Elf64_Sym *symbol = symbols->table + index;

    return ELF64_ST_TYPE(symbol->st_info) == STT_FUNC &&
           !(symbols->versions && (symbols->versions[index] & HIDDEN_VERSION)) &&
           text_equal(symbols->names + symbol->st_name, name);
}

/* The table, which has definitions only: number of buckets, first symbol in it, words of the
 * filter, a shift; then the filter, the buckets, and the hash of each symbol, the last of a bucket
 * marked by an odd one. */
static void *find_definition(const struct symbols *symbols, const char *name) {
    const uint32_t *table = symbols->hashes;
    const uint32_t *buckets = table + 4 + 2 * (size_t)table[2];
    const uint32_t *hashes = buckets + table[0];
    const uint32_t sought = hash(name);
    uint32_t index = table[0] ? buckets[sought % table[0]] : 0;

    if (index < table[1])
        return NULL;
    for (;; index++) {
        const uint32_t at = hashes[index - table[1]];

        if ((at | 1) == (sought | 1) && is_definition(symbols, index, name))
            return (void *)(symbols->base + symbols->table[index].st_value);
        if (at & 1)
            return NULL;
    }
}

static int look_at(struct dl_phdr_info *object, size_t size, void *argument) {
    int *behind_us = argument;
    struct symbols symbols;

    (void)size;
    if (!*behind_us)
        *behind_us = is_ours(object);
    else if (find_symbols(object, &symbols)) {
        for (int i = 0; i < NEXT_COUNT; i++) {
            if (!found[i])
                found[i] = find_definition(&symbols, names[i]);
        }
    }
    return 0;
}

__attribute__((constructor)) static void search(void) {
    int behind_us = 0;

    if (dl_iterate_phdr)
        dl_iterate_phdr(look_at, &behind_us);
    __atomic_store_n(&have_searched, 1, __ATOMIC_RELEASE);
}

/* Another library's constructor may start a program before ours has run. */
void *next_function(enum next which) {
    if (!__atomic_load_n(&have_searched, __ATOMIC_ACQUIRE))
        search();
    return found[which];
}
