#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "lock.h"
#include "notify.h"
#include "report.h"
#include "syscalls.h"
#include "text.h"

static int is_below(int descriptor, const char *directory) {
    char path[CONFIG_MAX_PATH];
    const char *rest;

    path_of_descriptor(descriptor, path, sizeof path);
    rest = text_after(path, directory);
    return rest && (!*rest || *rest == '/' || text_equal(directory, "/"));
}

/* Calls that the kernel would refuse whatever the file system are left to it, so that its EBADF and
 * EINVAL are the program's: bad and O_PATH descriptors, and those opened for neither reading nor
 * writing. Of record locks record.c has found out the rest. */
static int is_lockable(int descriptor, const struct client_request *request, struct stat *status) {
    int plain = request->operation & ~LOCK_NB;
    long flags = sys3(SYS_fcntl, descriptor, F_GETFL, 0);

    if (request->family == FAMILY_FLOCK &&
        ((plain != LOCK_SH && plain != LOCK_EX && plain != LOCK_UN) ||
         (flags & O_ACCMODE) == O_ACCMODE))
        return 0;
    return flags >= 0 && !(flags & O_PATH) && sys2(SYS_fstat, descriptor, status) == 0;
}

/* File systems that cannot lock refuse regular files only; --force is for any file that programs
 * lock by name. */
int lock_without_kernel(const struct config *config, int descriptor,
                        const struct client_request *request) {
    struct stat status;

    if ((!config->force && !config->simulate) || !is_lockable(descriptor, request, &status))
        return 0;
    if (config->simulate && S_ISREG(status.st_mode) &&
        (!*config->simulate_directory || is_below(descriptor, config->simulate_directory)))
        return config->simulate;
    if (config->force && (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode)))
        return CONFIG_FORCED_ERROR;
    return 0;
}

int lock_by_kernel(const struct config *config, int descriptor, int operation) {
    const struct client_request request = {.family = FAMILY_FLOCK, .operation = operation};
    int error = lock_without_kernel(config, descriptor, &request);

    return error ? -error : (int)sys2(SYS_flock, descriptor, operation);
}

/* A filter whose supervisor has ended answers ENOSYS for every file: seccomp_unotify(2). */
static int is_call_missing(const struct config *config, int kernel_error) {
    return kernel_error == ENOSYS && !config->force && !config->simulate &&
           sys2(SYS_flock, PING_DESCRIPTOR, LOCK_UN) == -ENOSYS;
}

int lock_by_mode(const struct config *config, struct client_wait *wait, int descriptor,
                 const struct client_request *request, int kernel_error) {
    int result;

    switch (config->mode) {
    case MODE_SUCCESS:
        return 0;
    case MODE_FAIL:
        return -kernel_error;
    default:
        if (is_call_missing(config, kernel_error)) {
            struct text text = text_over(wait->refusal, sizeof wait->refusal);

            text_add(&text,
                     "the call itself is missing; has the supervisor of this program ended?");
            return -kernel_error;
        }
        result = client_lock(config, wait, descriptor, request);
        return *wait->refusal ? -kernel_error : result;
    }
}

int flock_by_mode(const struct config *config, struct client_wait *wait, int descriptor,
                  int operation, int kernel_error) {
    const struct client_request request = {.family = FAMILY_FLOCK, .operation = operation};

    return lock_by_mode(config, wait, descriptor, &request, kernel_error);
}
