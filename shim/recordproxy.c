/* The kernel's record locks on a keeper's proxy files, by open file descriptions: one for each
 * owner, so that the kernel itself keeps apart what all keepers of the host hold. */
#include <errno.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"
#include "record.h"

static struct flock lock_over(int operation, int64_t first, int64_t last) {
    return (struct flock){.l_type = operation & LOCK_SH   ? F_RDLCK
                                    : operation & LOCK_EX ? F_WRLCK
                                                          : F_UNLCK,
                          .l_whence = SEEK_SET,
                          .l_start = first,
                          .l_len = last == RECORD_END ? 0 : last - first + 1};
}

/* By number, since the shim may be preloaded into this process: shells with flockshim --env. */
int native_lock_record(int descriptor, int operation, int64_t first, int64_t last) {
    struct flock lock = lock_over(operation, first, last);
    struct stat status;

    if (syscall(SYS_fcntl, descriptor, F_OFD_SETLK, &lock) < 0)
        return errno == EAGAIN || errno == EACCES ? 0 : -errno;
    return operation & LOCK_UN || (fstat(descriptor, &status) == 0 && status.st_nlink) ? 1
                                                                                       : -ENOENT;
}

int native_test_record(int descriptor, int operation, struct native_range *range) {
    struct flock lock = lock_over(operation, range->first, range->last);

    if (syscall(SYS_fcntl, descriptor, F_OFD_GETLK, &lock) < 0)
        return -errno;
    range->exclusive = lock.l_type == F_WRLCK;
    range->first = lock.l_start;
    range->last = lock.l_len ? lock.l_start + lock.l_len - 1 : RECORD_END;
    return lock.l_type != F_UNLCK;
}
