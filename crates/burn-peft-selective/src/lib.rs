//!  masks over the model's own parameters, one file a method:Selective methods: some of the model's own entries are trained, and only those. One file a method.
