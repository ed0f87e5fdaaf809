/* Starts the keeper from inside a program that must not notice. */
#ifndef FLOCKSHIM_START_H
#define FLOCKSHIM_START_H

#include "config.h"
#include "rendezvous.h"

/* NULL when a keeper listens or is about to (started here or by another program); else the reason,
 * one line without its end. Blocks while another program starts it: a matter of milliseconds. */
const char *start_keeper(const struct config *config, const struct rendezvous *rendezvous);

#endif
