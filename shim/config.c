#include <errno.h>
#include <stddef.h>
#include <sys/stat.h>

#include "config.h"
#include "syscalls.h"
#include "text.h"

static struct config the_config;

static void copy_path(struct config *config, char *to, const char *value, const char *name) {
    struct text text = text_over(to, CONFIG_MAX_PATH);

    text_add(&text, value);
    if (text.truncated)
        config->bad = name;
}

/* A number at *at, which is moved behind it; -1 where there is none. */
static int take_number(const char **at) {
    int number = 0;
    const char *begin = *at;

    while (**at >= '0' && **at <= '9' && number < 100000)
        number = number * 10 + (*(*at)++ - '0');
    return *at == begin ? -1 : number;
}

static void set_triggers(struct config *config, const char *value) {
    config->trigger_count = 0;
    for (;;) {
        int number = take_number(&value);

        if (number <= 0 || config->trigger_count == CONFIG_MAX_TRIGGERS ||
            (*value && *value != ',')) {
            config->bad = "FLOCKSHIM_ERRNO";
            return;
        }
        config->triggers[config->trigger_count++] = number;
        if (!*value++)
            return;
    }
}

static void set_mode(struct config *config, const char *value) {
    if (text_equal(value, "cluster"))
        config->mode = MODE_CLUSTER;
    else if (text_equal(value, "host"))
        config->mode = MODE_HOST;
    else if (text_equal(value, "auto"))
        config->mode = MODE_AUTO;
    else if (text_equal(value, "success"))
        config->mode = MODE_SUCCESS;
    else if (text_equal(value, "fail"))
        config->mode = MODE_FAIL;
    else
        config->bad = "FLOCKSHIM_MODE";
}

static void set_simulate(struct config *config, const char *value) {
    int number = take_number(&value);

    if (number <= 0 || (*value && *value != ':')) {
        config->bad = "FLOCKSHIM_SIMULATE";
        return;
    }
    config->simulate = number;
    if (*value == ':')
        copy_path(config, config->simulate_directory, value + 1, "FLOCKSHIM_SIMULATE");
}

/* Seconds, with at most three decimals. */
static void set_timeout(struct config *config, const char *value) {
    int seconds = take_number(&value);
    int unit = 1000;
    int milliseconds = 0;

    if (*value == '.') {
        for (value++; *value >= '0' && *value <= '9' && unit > 1; value++) {
            unit /= 10;
            milliseconds += (*value - '0') * unit;
        }
    }
    if (seconds < 0 || *value)
        config->bad = "FLOCKSHIM_TIMEOUT";
    else
        config->timeout = seconds * 1000 + milliseconds;
}

static int is_on(const char *value) {
    return *value && !text_equal(value, "0");
}

static void set(struct config *config, const char *entry) {
    const char *value = text_after(entry, "FLOCKSHIM_");

    if (!value)
        return;
    entry = value;
    if ((value = text_after(entry, "MODE=")) && *value)
        set_mode(config, value);
    else if ((value = text_after(entry, "ERRNO=")) && *value)
        set_triggers(config, value);
    else if ((value = text_after(entry, "FORCE=")))
        config->force = is_on(value);
    else if ((value = text_after(entry, "QUIET=")))
        config->quiet = is_on(value);
    else if ((value = text_after(entry, "VERBOSE=")))
        config->verbose = is_on(value);
    else if ((value = text_after(entry, "TIMEOUT=")) && *value)
        set_timeout(config, value);
    else if ((value = text_after(entry, "ON_LOST=")))
        config->only_warn = text_equal(value, "warn");
    else if ((value = text_after(entry, "SIMULATE=")) && *value)
        set_simulate(config, value);
    else if ((value = text_after(entry, "DIR=")))
        copy_path(config, config->directory, value, "FLOCKSHIM_DIR");
    else if ((value = text_after(entry, "PYTHON=")))
        copy_path(config, config->python, value, "FLOCKSHIM_PYTHON");
    else if ((value = text_after(entry, "HOME=")))
        copy_path(config, config->home, value, "FLOCKSHIM_HOME");
}

static void note_standard_error(struct config *config) {
    struct stat status;

    if (sys2(SYS_fstat, 2, &status) == 0) {
        config->error_device = status.st_dev;
        config->error_inode = status.st_ino;
    }
}

void config_read(struct config *config, char **environment) {
    static const int defaults[] = {ENOSYS, EOPNOTSUPP, ENOLCK, ERRNO_KERNEL_ENOTSUPP};

    config->timeout = -1;
    config->trigger_count = sizeof defaults / sizeof *defaults;
    for (int i = 0; i < config->trigger_count; i++)
        config->triggers[i] = defaults[i];
    while (environment && *environment)
        set(config, *environment++);
    note_standard_error(config);
    __atomic_store_n(&config->loaded, 1, __ATOMIC_RELEASE);
}

/* Another library's constructor may lock before ours has run. */
const struct config *config_get(void) {
    if (!__atomic_load_n(&the_config.loaded, __ATOMIC_ACQUIRE))
        config_read(&the_config, &environ ? environ : NULL);
    return &the_config;
}

__attribute__((constructor)) static void load_early(void) {
    config_get();
}

int config_triggers(const struct config *config, int error) {
    if (error && (error == config->simulate || (config->force && error == CONFIG_FORCED_ERROR)))
        return 1;
    for (int i = 0; i < config->trigger_count; i++) {
        if (config->triggers[i] == error)
            return 1;
    }
    return 0;
}
