/* Where the programs of one user on one host meet: the directory, and the names in it. */
#ifndef FLOCKSHIM_RENDEZVOUS_H
#define FLOCKSHIM_RENDEZVOUS_H

#include <stdint.h>
#include <sys/un.h>

#include "config.h"
#include "protocol.h"

#define RENDEZVOUS_KEY_SIZE 17

struct rendezvous {
    char directory[CONFIG_MAX_DIRECTORY + 1];
    char key[RENDEZVOUS_KEY_SIZE]; /* one keeper for each key in a directory */
    struct sockaddr_un address;
};

/* 0, or -ENAMETOOLONG where FLOCKSHIM_DIR is too long for a socket address. */
int rendezvous_find(const struct config *config, struct rendezvous *rendezvous);

/* Turns to the keeper of another key in the same directory. As above. */
int rendezvous_set_key(struct rendezvous *rendezvous, const char *key);

/* Whether any keeper may know of a lock on this file. */
int rendezvous_has_proxy(const struct rendezvous *rendezvous,
                         const struct protocol_request *request);

#endif
