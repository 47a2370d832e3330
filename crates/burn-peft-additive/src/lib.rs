//!  adapters, soft prompts, scale and shift, one file a method:Additive methods: something new stands beside the frozen layers, or in front of what they read. One file a method.
