//! The one list of methods. What works on any method is a [`Job`], so that no code names one.

use burn_peft_core::{Error, Method};

/// Something to do with a method that is known only at run time.
pub trait Job {
    /// What comes out.
    type Output;

    /// Does it with `T`.
    fn run<T: Method>(self) -> Self::Output;
}

/// Something to do with every method.
pub trait ForEach {
    /// Does it with `T`.
    fn visit<T: Method>(&mut self);
}

macro_rules! methods {
    ($($method:ty),+ $(,)?) => {
        /// `peft_type` of every method, in the order of the list.
        pub const NAMES: &[&str] = &[$(<$method as Method>::NAME),+];

        /// Does `job` with the method of that `peft_type`, in any case.
        ///
        /// # Errors
        /// A name that no method has; the message lists those there are.
        pub fn with_method<J: Job>(name: &str, job: J) -> Result<J::Output, Error> {
            $(if <$method as Method>::NAME.eq_ignore_ascii_case(name) {
                return Ok(job.run::<$method>());
            })+
            Err(Error::config(
                "peft_type",
                format!("`{name}` is not implemented; expected one of {}", NAMES.join(", ")),
            ))
        }

        /// Does something with every method.
        pub fn for_each_method(job: &mut impl ForEach) {
            $(job.visit::<$method>();)+
        }
    };
}

methods![burn_peft_reparam::Lora];
