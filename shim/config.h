/* What the environment asks of the shim. Read once, when the library is loaded: a program may
 * change or overwrite its environment later (setproctitle does), and reading it then would race
 * with setenv(3). */
#ifndef FLOCKSHIM_CONFIG_H
#define FLOCKSHIM_CONFIG_H

#include <stdint.h>

#define CONFIG_MAX_TRIGGERS 32
#define CONFIG_MAX_PATH 4096
/* So that DIR/k-<16 digits>.sock fits into sun_path, unix(7). */
#define CONFIG_MAX_DIRECTORY 84

/* The kernel's ENOTSUPP, which some network file systems let through; C libraries have no name for
 * it. */
#define ERRNO_KERNEL_ENOTSUPP 524

/* What stands in for the kernel's answer where --force keeps it from being asked. */
#define CONFIG_FORCED_ERROR ENOSYS

enum config_mode { MODE_AUTO, MODE_HOST, MODE_CLUSTER, MODE_SUCCESS, MODE_FAIL };

struct config {
    int loaded;
    enum config_mode mode;
    int force;
    int quiet;
    int verbose;
    int only_warn; /* of a lost lease */
    int timeout;   /* milliseconds that a lock may be waited for; negative: for ever */
    uint64_t error_device, error_inode; /* the standard error that the program was started with */
    int simulate; /* errno that stands in for the kernel's answer; 0: ask the kernel */
    int triggers[CONFIG_MAX_TRIGGERS];
    int trigger_count;
    const char *bad; /* the variable that could not be understood, or NULL */
    char simulate_directory[CONFIG_MAX_PATH];
    char directory[CONFIG_MAX_PATH]; /* FLOCKSHIM_DIR, or empty */
    char python[CONFIG_MAX_PATH];
    char home[CONFIG_MAX_PATH];
};

/* The settings of this process. */
const struct config *config_get(void);
/* Those of an environment: "NAME=value" strings, NULL at the end. */
void config_read(struct config *config, char **environment);
/* Whether a lock call's errno means that the kernel cannot lock. */
int config_triggers(const struct config *config, int error);

extern char **environ __attribute__((weak));

#endif
