//! Nothing to use: the measurements are in `benches/`.
