//! Backends by name: which are compiled is a Cargo feature, which is used a run-time choice.

use burn::tensor::Device;
use burn_peft_core::Error;

/// Names of the backends that this build has.
pub fn names() -> Vec<&'static str> {
    let all = [
        ("flex", cfg!(feature = "flex")),
        ("ndarray", cfg!(feature = "ndarray")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("cuda", cfg!(feature = "cuda")),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

/// The plain device of that name: `flex`, `ndarray`, `wgpu`, `vulkan` or `cuda`.
///
/// # Errors
/// A name that is no backend, or a backend that this build leaves out; the message says with which
/// Cargo feature it comes.
pub fn by_name(name: &str) -> Result<Device, Error> {
    match name {
        #[cfg(feature = "flex")]
        "flex" | "cpu" => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        "ndarray" => Ok(Device::ndarray()),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(0)),
        "flex" | "cpu" | "ndarray" | "wgpu" | "vulkan" | "cuda" => Err(Error::config(
            "device",
            format!(
                "`{name}` is not in this build, which has {}; build with --features {name}",
                names().join(", ")
            ),
        )),
        _ => Err(Error::config(
            "device",
            format!("`{name}` is no backend; expected one of {}", names().join(", ")),
        )),
    }
}
