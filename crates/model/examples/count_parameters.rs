//! Counts the parameters of presets on the built modules; nothing is drawn, so any size fits.
//!
//! `cargo run --release --example count_parameters -- switch-base-128 t5-efficient-base-nl36`
#![allow(clippy::print_stdout)]

use burn::module::Module;
use burn::tensor::Device;
use switchyard_config::{PresetError, preset, preset_names};
use switchyard_model::SwitchTransformer;

fn main() -> Result<(), PresetError> {
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    if names.is_empty() {
        names = preset_names();
    }
    for name in names {
        let config = preset(&name)?;
        let model = SwitchTransformer::new(&config, 0, &Device::flex());
        let experts = match config.num_experts {
            0 => "dense".to_owned(),
            n => format!("{n} experts"),
        };
        println!("{name:<24} {:>20} parameters, {experts}", model.num_params());
    }
    Ok(())
}
