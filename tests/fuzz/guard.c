// Red zones around what is allocated with an alignment, which torch's tensors and the kernels' workspaces are: to be
// preloaded (LD_PRELOAD). A write outside ends the process when the memory is freed.
//
// All bytes of a new allocation and of its zones are 0xff, which is NaN in every float dtype: what is read before it was
// written, or outside, shows in a result.
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *p);

enum { kZone = 64, kFilled = 16 << 20 };  // bytes: of a zone, and of what is filled at most, for time's sake

struct Header {  // at the begin of the zone before the memory
  uintptr_t mark;
  size_t size, before;  // before: from the block's begin to the memory's
};

static uintptr_t mark_of(const void *p) { return (uintptr_t)p ^ (uintptr_t)0x5afe6a2d5afe6a2d; }

static void *guarded(size_t alignment, size_t size) {
  const size_t before = alignment > kZone ? alignment : kZone;
  if (size > SIZE_MAX - before - kZone) return NULL;
  char *block = __libc_memalign(before, before + size + kZone);
  if (!block) return NULL;
  char *p = block + before;
  memset(p - kZone, 0xff, kZone);
  memset(p, 0xff, size < kFilled ? size : kFilled);
  memset(p + size, 0xff, kZone);
  *(struct Header *)(p - kZone) = (struct Header){mark_of(p), size, before};
  return p;
}

int posix_memalign(void **p, size_t alignment, size_t size) {
  void *found = guarded(alignment, size);
  if (!found) return ENOMEM;
  *p = found;
  return 0;
}

void *aligned_alloc(size_t alignment, size_t size) { return guarded(alignment, size); }

static int is_untouched(const char *from, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (from[i] != (char)0xff) return 0;
  return 1;
}

void free(void *p) {
  struct Header *header = (struct Header *)((char *)p - kZone);
  if (!p || (uintptr_t)p % kZone || header->mark != mark_of(p)) return __libc_free(p);
  const size_t own = sizeof(struct Header), size = header->size;
  if (!is_untouched((char *)header + own, kZone - own) || !is_untouched((char *)p + size, kZone)) {
    static const char told[] = "guard: memory was written outside of an allocation\n";
    if (write(2, told, sizeof told - 1)) abort();
    abort();
  }
  char *block = (char *)p - header->before;
  header->mark = 0;
  memset(p, 0xff, size < kFilled ? size : kFilled);
  __libc_free(block);
}
