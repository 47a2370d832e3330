//! Modules without parameters that say something of the module that holds them.

/// Makes `$type` such a module: a visitor, which sees names and parameters only, meets each of its `names` under the type
/// `MARK`.
macro_rules! mark {
    ($type:ident) => {
        impl ::burn::module::Module for $type {
            fn collect_devices(&self, devices: ::burn::module::Devices) -> ::burn::module::Devices {
                devices
            }

            fn fork(self, _device: &::burn::tensor::Device) -> Self {
                self
            }

            fn to_device(self, _device: &::burn::tensor::Device) -> Self {
                self
            }

            fn train(self) -> Self {
                self
            }

            fn valid(&self) -> Self {
                <Self as Clone>::clone(self)
            }

            fn materialize(self) -> Self {
                self
            }

            fn visit<V: ::burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                for name in self.names() {
                    visitor.enter_module(&name, Self::MARK);
                    visitor.exit_module(&name, Self::MARK);
                }
            }

            fn map<M: ::burn::module::ModuleMapper>(self, _mapper: &mut M) -> Self {
                self
            }
        }

        impl ::burn::module::ModuleDisplayDefault for $type {
            fn content(&self, content: ::burn::module::Content) -> Option<::burn::module::Content> {
                content.add("says", &self.names().join(", ")).optional()
            }
        }

        impl ::burn::module::ModuleDisplay for $type {}
    };
}
pub(crate) use mark;
