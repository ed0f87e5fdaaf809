#include "record.h"

#include <errno.h>
#include <stdint.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "syscalls.h"

_Static_assert(sizeof(off_t) == 8, "struct flock must be the one that SYS_fcntl takes");

int record_is_command(int command) {
    switch (command) {
    case F_GETLK:
    case F_SETLK:
    case F_SETLKW:
    case F_OFD_GETLK:
    case F_OFD_SETLK:
    case F_OFD_SETLKW:
        return 1;
    default:
        return 0;
    }
}

static int is_test(int command) {
    return command == F_GETLK || command == F_OFD_GETLK;
}

static int is_of_description(int command) {
    return command == F_OFD_GETLK || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}

static int64_t origin(int descriptor, int whence) {
    struct stat status;

    switch (whence) {
    case SEEK_SET:
        return 0;
    case SEEK_CUR:
        return sys3(SYS_lseek, descriptor, 0, SEEK_CUR);
    case SEEK_END: {
        long result = sys2(SYS_fstat, descriptor, &status);

        return result < 0 ? result : status.st_size;
    }
    default:
        return -EINVAL;
    }
}

/* As flock64_to_posix_lock in the kernel's fs/locks.c, in this order. */
static int set_range(int descriptor, const struct flock *lock, struct client_request *request) {
    int64_t start = origin(descriptor, lock->l_whence);

    if (start < 0)
        return (int)start;
    if (lock->l_start > RECORD_END - start)
        return -EOVERFLOW;
    start += lock->l_start;
    if (start < 0)
        return -EINVAL;
    request->last = RECORD_END;
    if (lock->l_len > 0) {
        if (lock->l_len - 1 > RECORD_END - start)
            return -EOVERFLOW;
        request->last = start + (lock->l_len - 1);
    } else if (lock->l_len < 0) {
        if (start + lock->l_len < 0)
            return -EINVAL;
        request->last = start - 1;
        start += lock->l_len;
    }
    request->first = start;
    return 0;
}

static int set_operation(int command, int type, struct client_request *request) {
    if (type != F_RDLCK && type != F_WRLCK && type != F_UNLCK)
        return -EINVAL;
    /* Since Linux 6.6 a description may ask what it holds itself. */
    if (type == F_UNLCK && command == F_GETLK)
        return -EINVAL;
    request->operation = type == F_RDLCK ? LOCK_SH : type == F_WRLCK ? LOCK_EX : LOCK_UN;
    if (is_test(command))
        request->operation |= LOCK_TEST;
    else if (command != F_SETLKW && command != F_OFD_SETLKW)
        request->operation |= LOCK_NB;
    return 0;
}

static int check_access(long flags, int operation) {
    long access = flags & O_ACCMODE;

    if (operation & LOCK_TEST)
        return 0;
    if ((operation & LOCK_SH && access != O_RDONLY && access != O_RDWR) ||
        (operation & LOCK_EX && access != O_WRONLY && access != O_RDWR))
        return -EBADF;
    return 0;
}

int record_request(int descriptor, int command, const struct flock *lock,
                   struct client_request *request) {
    long flags = sys3(SYS_fcntl, descriptor, F_GETFL, 0);
    int result;

    if (flags < 0 || flags & O_PATH)
        return -EBADF;
    request->family = is_of_description(command) ? FAMILY_DESCRIPTION : FAMILY_PROCESS;
    result = set_operation(command, lock->l_type, request);
    if (result == 0)
        result = set_range(descriptor, lock, request);
    if (result == 0)
        result = check_access(flags, request->operation);
    if (result == 0 && is_of_description(command) && lock->l_pid != 0)
        result = -EINVAL;
    return result;
}

void record_answer(const struct client_wait *wait, struct flock *lock) {
    const struct protocol_record *found = &wait->found;

    lock->l_type = F_UNLCK;
    if (!wait->is_found)
        return;
    lock->l_type = found->exclusive ? F_WRLCK : F_RDLCK;
    lock->l_whence = SEEK_SET;
    lock->l_start = found->first;
    lock->l_len = found->last == RECORD_END ? 0 : found->last - found->first + 1;
    lock->l_pid = found->pid;
}
