/* A connection to a keeper: one request, then what the keeper says to it. */
#ifndef FLOCKSHIM_CHANNEL_H
#define FLOCKSHIM_CHANNEL_H

#include <sys/types.h>
#include <sys/un.h>

#include "protocol.h"

struct channel {
    long socket;
    ino_t inode;
};

/* NULL, or the reason why there can be none. */
const char *channel_open(struct channel *channel);

/* 0; -EPERM where the keeper is another user's; other errnos: nobody listens. */
long channel_connect(const struct channel *channel, const struct sockaddr_un *address);

/* Whether the socket is still ours: another thread may close every descriptor while this one waits,
 * and open its own. */
int channel_is_intact(const struct channel *channel);
void channel_close(const struct channel *channel);

/* As sendmsg(2), with -errno; the descriptor goes along unless it is negative. */
long channel_send(const struct channel *channel, const struct protocol_request *request,
                  int descriptor);

/* As recv(2), with -errno. The text ends with 0. */
long channel_receive(const struct channel *channel, struct protocol_answer *answer, int flags);

#endif
