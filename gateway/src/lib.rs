//! The gateway of nilicon: network frames and their release, the agent that runs one host, and
//! the commands.

pub mod agent;
mod chain;
pub mod cli;
pub mod frames;
