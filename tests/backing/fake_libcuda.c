// A libcuda.so.1 without a GPU: CUDA's virtual memory calls over a memory file, as strict as the
// driver's documentation. The tests build it with gcc and load it in child processes alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_FOUND = 500 };
enum { GRANULE = 2 << 20, MOST = 4096, VMM_SUPPORTED = 102 };

typedef unsigned long long ptr_t;
struct location { int type, id; };
struct properties { int type, handle_types; struct location where; void *meta; uint64_t flags; };
struct access { struct location where; int flags; };

static int file = -1;
static size_t file_end, taken;
static struct { size_t size, offset; int mappings, alive; } handles[MOST];
static struct { ptr_t at; size_t size; } reserved[MOST];
static struct { ptr_t at; size_t size; int handle; } mapped[MOST];

static size_t limit(void) {
    const char *text = getenv("FAKE_CUDA_BYTES");
    return text ? strtoull(text, 0, 10) : (size_t)1 << 30;
}

static int aligned(size_t number) { return number && number % GRANULE == 0; }

// What is left; a test reads it after close.
int fake_handles(void) {
    int n = 0;
    for (int i = 1; i < MOST; i++) n += handles[i].size != 0;
    return n;
}
int fake_mappings(void) {
    int n = 0;
    for (int i = 0; i < MOST; i++) n += mapped[i].size != 0;
    return n;
}
int fake_reservations(void) {
    int n = 0;
    for (int i = 0; i < MOST; i++) n += reserved[i].size != 0;
    return n;
}

int cuInit(unsigned flags) { return flags ? INVALID : OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return ordinal ? 101 : OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == VMM_SUPPORTED && !getenv("FAKE_CUDA_NO_VMM");
    return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &file; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
int cuCtxSetCurrent(void *context) { return OK; }
int cuCtxSynchronize(void) { return OK; }
int cuGetErrorName(int code, const char **name) {
    *name = code == INVALID ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OUT_OF_MEMORY";
    return OK;
}

int cuMemGetAllocationGranularity(size_t *size, const struct properties *p, int option) {
    *size = GRANULE;
    return p->type == 1 && p->where.type == 1 ? OK : INVALID;
}

int cuMemAddressReserve(ptr_t *at, size_t size, size_t alignment, ptr_t hint, uint64_t flags) {
    if (!aligned(size) || flags) return INVALID;
    char *start = mmap(0, size + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return NO_MEMORY;
    ptr_t address = ((ptr_t)start + GRANULE - 1) / GRANULE * GRANULE;
    if (address > (ptr_t)start) munmap(start, address - (ptr_t)start);
    munmap((void *)(address + size), (ptr_t)start + GRANULE - address);
    for (int i = 0; i < MOST; i++)
        if (!reserved[i].size) {
            reserved[i].at = *at = address;
            reserved[i].size = size;
            return OK;
        }
    return NO_MEMORY;
}

int cuMemAddressFree(ptr_t at, size_t size) {
    for (int i = 0; i < MOST; i++)
        if (mapped[i].size && mapped[i].at >= at && mapped[i].at < at + size) return INVALID;
    for (int i = 0; i < MOST; i++)
        if (reserved[i].at == at && reserved[i].size == size) {
            reserved[i].size = reserved[i].at = 0;
            munmap((void *)at, size);
            return OK;
        }
    return INVALID;
}

int cuMemCreate(ptr_t *handle, size_t size, const struct properties *p, uint64_t flags) {
    if (!aligned(size) || p->type != 1 || p->where.type != 1 || flags) return INVALID;
    if (taken + size > limit()) return NO_MEMORY;
    if (file < 0) file = memfd_create("fake-cuda", MFD_CLOEXEC);
    for (int i = 1; i < MOST; i++)
        if (!handles[i].size) {
            handles[i].size = size;
            handles[i].offset = file_end;
            handles[i].alive = 1;
            handles[i].mappings = 0;
            file_end += size;
            taken += size;
            *handle = i;
            return ftruncate(file, file_end) ? NO_MEMORY : OK;
        }
    return NO_MEMORY;
}

static void drop(int handle) {
    if (handles[handle].alive || handles[handle].mappings) return;
    fallocate(file, 3 /* punch a hole, keep the size */, handles[handle].offset, handles[handle].size);
    taken -= handles[handle].size;
    handles[handle].size = 0;
}

int cuMemRelease(ptr_t handle) {
    if (handle >= MOST || !handles[handle].alive) return INVALID;
    handles[handle].alive = 0;
    drop(handle);
    return OK;
}

int cuMemMap(ptr_t at, size_t size, size_t offset, ptr_t handle, uint64_t flags) {
    if (handle >= MOST || !handles[handle].alive || offset || flags) return INVALID;
    if (!aligned(at) || size != handles[handle].size) return INVALID;
    int inside = 0, slot = -1;
    for (int i = 0; i < MOST; i++) {
        if (reserved[i].size && at >= reserved[i].at && at + size <= reserved[i].at + reserved[i].size)
            inside = 1;
        if (mapped[i].size && mapped[i].at < at + size && at < mapped[i].at + mapped[i].size)
            return INVALID;
        if (!mapped[i].size && slot < 0) slot = i;
    }
    if (!inside || slot < 0) return INVALID;
    if (mmap((void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, file, handles[handle].offset)
        == MAP_FAILED) return NO_MEMORY;
    mapped[slot].at = at;
    mapped[slot].size = size;
    mapped[slot].handle = handle;
    handles[handle].mappings++;
    return OK;
}

// Whether a range is made of whole mappings.
static int whole(ptr_t at, size_t size) {
    size_t covered = 0;
    for (int i = 0; i < MOST; i++) {
        if (!mapped[i].size || mapped[i].at >= at + size || at >= mapped[i].at + mapped[i].size) continue;
        if (mapped[i].at < at || mapped[i].at + mapped[i].size > at + size) return 0;
        covered += mapped[i].size;
    }
    return size && covered == size;
}

int cuMemSetAccess(ptr_t at, size_t size, const struct access *a, size_t count) {
    if (!whole(at, size) || count != 1 || a->where.type != 1 || a->flags != 3) return INVALID;
    return mprotect((void *)at, size, PROT_READ | PROT_WRITE) ? INVALID : OK;
}

int cuMemUnmap(ptr_t at, size_t size) {
    if (!whole(at, size)) return INVALID;
    mmap((void *)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    for (int i = 0; i < MOST; i++)
        if (mapped[i].size && mapped[i].at >= at && mapped[i].at < at + size) {
            mapped[i].size = 0;
            handles[mapped[i].handle].mappings--;
            drop(mapped[i].handle);
        }
    return OK;
}

int cuMemcpyHtoD_v2(ptr_t to, const void *from, size_t size) { memcpy((void *)to, from, size); return OK; }
int cuMemsetD8_v2(ptr_t to, unsigned char value, size_t size) { memset((void *)to, value, size); return OK; }
int cuMemcpyDtoH_v2(void *to, ptr_t from, size_t size) { memcpy(to, (void *)from, size); return OK; }

// The way by which cuda.bindings finds all of the above; _v2 is a newer form under the old name.
int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
    char newer[128];
    strncpy(newer, name, 120);
    newer[120] = 0;
    strcat(newer, "_v2");
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *found = dlsym(self, newer);
    if (!*found) *found = dlsym(self, name);
    if (status) *status = *found ? 0 : 1;
    return *found ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
