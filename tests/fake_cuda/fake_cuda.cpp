// A CUDA device without a GPU, for a CPU build of torch: what FakeTensorMode and autograd ask of one.
// Load it before torch, which looks for a device once.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

namespace {
struct OneDevice : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  const Device device{DeviceType::CUDA, 0};
  Device getDevice() const override { return device; }
  // The same stream every time: between two of them autograd would want events.
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
};
OneDevice guard;
c10::impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
}  // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface {  // torch looks for this name
  CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
