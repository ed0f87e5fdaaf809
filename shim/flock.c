/* flock(2), the only thing a program sees of us. */
#include <errno.h>

#include "lock.h"
#include "report.h"

__attribute__((visibility("default"))) int flock(int descriptor, int operation);

static int emulated(const struct config *config, int descriptor, int operation, int kernel_error) {
    struct client_wait wait = {.timeout = config->timeout, .cancel = -1};
    int result = flock_by_mode(config, &wait, descriptor, operation, kernel_error);

    if (wait.timed_out)
        report_timeout(config, descriptor, wait.refusal);
    else if (*wait.refusal)
        report(config, descriptor, wait.refusal);
    return result;
}

int flock(int descriptor, int operation) {
    const struct config *config = config_get();
    int result = lock_by_kernel(config, descriptor, operation);

    if (config_triggers(config, -result))
        result = emulated(config, descriptor, operation, -result);
    if (result < 0) {
        errno = -result;
        return -1;
    }
    return 0;
}
