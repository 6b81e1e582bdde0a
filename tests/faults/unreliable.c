// SPDX-License-Identifier: Apache-2.0
// To be preloaded: a flock that always succeeds and locks nothing, as some network file systems have, and a wall clock
// that jumps ten years forwards and backwards at every look. The monotonic clock stays as it is.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

#define JUMP (10L * 365 * 24 * 3600)

static long jump(void) {
  static int looks;
  return getenv("CLOCK_JUMPS") ? (__atomic_add_fetch(&looks, 1, __ATOMIC_RELAXED) % 2 ? JUMP : -JUMP) : 0;
}

int flock(int fd, int operation) {
  static int (*real)(int, int);
  if (getenv("FLOCK_LIES")) return 0;
  if (!real) real = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
  return real(fd, operation);
}

int clock_gettime(clockid_t clock, struct timespec* out) {
  static int (*real)(clockid_t, struct timespec*);
  if (!real) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
  int status = real(clock, out);
  if (!status && clock == CLOCK_REALTIME) out->tv_sec += jump();
  return status;
}

time_t time(time_t* out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
