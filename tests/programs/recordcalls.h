/* One call for a record lock, by each of the ways in which programs make it. */
#ifndef RECORDCALLS_H
#define RECORDCALLS_H

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A test says these numbers, which are the kernel's for 64-bit programs. */
enum { SAY_GETLK = 5, SAY_SETLK, SAY_SETLKW, SAY_OFD_GETLK = 36, SAY_OFD_SETLK, SAY_OFD_SETLKW };

static inline int record_command(int said) {
    switch (said) {
    case SAY_GETLK:
        return F_GETLK;
    case SAY_SETLK:
        return F_SETLK;
    case SAY_SETLKW:
        return F_SETLKW;
    default:
        return said; /* those of open file descriptions are alike everywhere */
    }
}

#ifdef __x86_64__

enum { I386_GETLK64 = 12 };

/* struct flock and struct flock64 of a 32-bit program. */
struct i386_lock {
    short type, whence;
    int start, len, pid;
};
struct i386_lock64 {
    short type, whence;
    long long start, len;
    int pid;
} __attribute__((packed));

static inline long i386_call(int number, int fd, int command, void *low) {
    int result;

    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(fd), "c"(command), "d"((int)(long)low)
                     : "r8", "r9", "r10", "r11", "memory");
    if (result >= 0)
        return result;
    errno = -result;
    return -1;
}

static inline long record_i386(int number, int fd, int said, struct flock *lock, int large) {
    void *low =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (low == MAP_FAILED)
        return -1;
    long value;
    if (large) {
        struct i386_lock64 *there = low;
        *there = (struct i386_lock64){lock->l_type, lock->l_whence, lock->l_start, lock->l_len,
                                      lock->l_pid};
        int command = said <= SAY_SETLKW ? said - SAY_GETLK + I386_GETLK64 : said;
        value = i386_call(number, fd, command, low);
        *lock = (struct flock){.l_type = there->type,
                               .l_whence = there->whence,
                               .l_start = there->start,
                               .l_len = there->len,
                               .l_pid = there->pid};
    } else {
        struct i386_lock *there = low;
        *there = (struct i386_lock){lock->l_type, lock->l_whence, (int)lock->l_start,
                                    (int)lock->l_len, lock->l_pid};
        value = i386_call(number, fd, said, low);
        *lock = (struct flock){.l_type = there->type,
                               .l_whence = there->whence,
                               .l_start = there->start,
                               .l_len = there->len,
                               .l_pid = there->pid};
    }
    int err = errno;
    munmap(low, 4096);
    errno = err;
    return value;
}

#endif

/* HOW: a function of the C library; "raw" for none; "i386:NUMBER:BITS" as 32-bit programs do it, by
 * fcntl(2) or fcntl64(2), which are one, with the smaller or the larger structure. */
static inline long record_call(const char *how, int fd, int said, struct flock *lock) {
    if (strcmp(how, "fcntl") == 0)
        return fcntl(fd, record_command(said), lock);
#ifdef __GLIBC__
    if (strcmp(how, "fcntl64") == 0) {
        struct flock64 there = {.l_type = lock->l_type,
                                .l_whence = lock->l_whence,
                                .l_start = lock->l_start,
                                .l_len = lock->l_len,
                                .l_pid = lock->l_pid};
        int command = said == SAY_GETLK    ? F_GETLK64
                      : said == SAY_SETLK  ? F_SETLK64
                      : said == SAY_SETLKW ? F_SETLKW64
                                           : said;
        long value = fcntl64(fd, command, &there);
        *lock = (struct flock){.l_type = there.l_type,
                               .l_whence = there.l_whence,
                               .l_start = there.l_start,
                               .l_len = there.l_len,
                               .l_pid = there.l_pid};
        return value;
    }
#endif
#ifdef __LP64__
    if (strcmp(how, "raw") == 0)
        return syscall(SYS_fcntl, fd, said, lock);
#endif
#ifdef __x86_64__
    if (strncmp(how, "i386", 4) == 0)
        return record_i386(atoi(how + 5), fd, said, lock, strstr(how, ":64") != NULL);
#endif
    errno = ENOTSUP;
    return -1;
}

#endif
