/* Asks a keeper who holds and who waits. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "channel.h"
#include "native.h"

static int wait_for_answer(const struct channel *channel, int milliseconds) {
    struct pollfd event = {.fd = (int)channel->socket, .events = POLLIN};
    struct protocol_answer answer;
    int ready;

    do
        ready = poll(&event, 1, milliseconds);
    while (ready < 0 && errno == EINTR);
    if (ready == 0)
        return -ETIME;
    if (ready < 0 || channel_receive(channel, &answer, MSG_DONTWAIT) < PROTOCOL_ANSWER_HEAD)
        return -ECONNRESET;
    return answer.kind == KIND_ANSWER ? -answer.error : -EPROTO;
}

int native_ask_for_list(const char *socket_path, int descriptor, int milliseconds) {
    struct protocol_request request = {.magic = PROTOCOL_MAGIC,
                                       .version = PROTOCOL_VERSION,
                                       .kind = KIND_LIST,
                                       .descriptor = descriptor};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct channel channel;
    long result;

    if (strlen(socket_path) >= sizeof address.sun_path)
        return -ENAMETOOLONG;
    strcpy(address.sun_path, socket_path);
    if (channel_open(&channel))
        return -EMFILE;
    result = channel_connect(&channel, &address);
    if (result == 0)
        result = channel_send(&channel, &request, descriptor);
    if (result >= 0)
        result = wait_for_answer(&channel, milliseconds);
    channel_close(&channel);
    return (int)result;
}
