// A CUDA driver of no GPU: all that Triton asks of one succeeds, nothing is done, and launches are noted.

#include <stdlib.h>

typedef void *handle;
typedef struct {
  unsigned grid[3], block[3], shared;
  handle stream;
} configuration;  // as a CUlaunchConfig begins

enum { MOST = 256, EACH = 6, MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97 };
static long long noted[MOST * EACH];
static int count;

int take_notes(long long *to) {
  int found = count;
  for (int i = 0; i < found * EACH; i++) to[i] = noted[i];
  count = 0;
  return found;
}

int cuLaunchKernelEx(const configuration *config, handle function, void **arguments, void **extra) {
  if (count < MOST) {
    long long *at = noted + EACH * count++;
    for (int i = 0; i < 3; i++) at[i] = config->grid[i];
    at[3] = config->block[0], at[4] = (long long)function, at[5] = (long long)config->stream;
  }
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == MAJOR ? 9 : attribute == MINOR ? 0 : attribute == SHARED_OPTIN ? 227 * 1024 : 1 << 17;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, handle function) {
  *value = attribute == 0 ? 1024 : 32;  // the first is how many threads it may have
  return 0;
}
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  return 0;
}
int cuModuleGetFunction(handle *function, handle module, const char *name) {
  *function = malloc(1);
  return 0;
}
int cuModuleLoadData(handle *module, const void *image) { return *module = (handle)1, 0; }
int cuDevicePrimaryCtxRetain(handle *context, int device) { return *context = (handle)1, 0; }
int cuCtxGetCurrent(handle *context) { return *context = (handle)1, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0; }
int cuStreamIsCapturing(handle stream, int *status) { return *status = 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "none", 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 1 << 20, 0; }
int cuOccupancyMaxActiveClusters(int *clusters, handle function, handle config) { return *clusters = 1, 0; }

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuCtxSynchronize) NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuPointerGetAttributes) NOTHING(cuLaunchKernel)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
