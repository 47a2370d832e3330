//! Backends by name: which are compiled is a Cargo feature, which is used a run-time choice.

use burn::tensor::Device;
use burn_peft_core::Error;

/// The backends, and whether this build has them.
const BACKENDS: [(&str, bool); 5] = [
    ("flex", cfg!(feature = "flex")),
    ("ndarray", cfg!(feature = "ndarray")),
    ("wgpu", cfg!(feature = "wgpu")),
    ("vulkan", cfg!(feature = "vulkan")),
    ("cuda", cfg!(feature = "cuda")),
];

/// Names of the backends that this build has.
pub fn names() -> Vec<&'static str> {
    BACKENDS.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect()
}

/// The plain device of that name: `flex`, `ndarray`, `wgpu`, `vulkan` or `cuda`.
///
/// # Errors
/// A name that is no backend, or a backend that this build leaves out; the message says with which
/// Cargo feature it comes.
pub fn by_name(name: &str) -> Result<Device, Error> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        "ndarray" => Ok(Device::ndarray()),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(0)),
        _ => {
            let held = names().join(", ");
            let reason = match BACKENDS.iter().any(|(known, _)| *known == name) {
                true => format!(
                    "`{name}` is not in this build, which has {held}; build with --features {name}"
                ),
                false => format!("`{name}` is no backend; this build has {held}"),
            };
            Err(Error::config("device", reason))
        }
    }
}
