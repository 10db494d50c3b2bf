//! The crun backend. Init is born in `create`.

use async_trait::async_trait;

use super::{Backend, ChildIo, ExecSpec, Launched, Observed};
use crate::{
    error::{Error, Result},
    task::{bundle::Bundle, record::Record},
};

/// See the module.
#[derive(Debug, Default)]
pub struct Crun {}

impl Crun {
    /// A backend that keeps no state.
    pub fn new() -> Self {
        Self {}
    }
}

#[async_trait]
impl Backend for Crun {
    fn name(&self) -> &'static str {
        "crun"
    }

    async fn create(&self, _rec: &Record, _bundle: &Bundle, _io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        Err(Error::unimplemented("create"))
    }

    async fn start(&self, _rec: &Record, _io: &mut Option<ChildIo>) -> Result<Option<Launched>> {
        Err(Error::unimplemented("start"))
    }

    async fn exec(&self, _rec: &Record, _exec_id: &str, _process: &ExecSpec, _io: ChildIo) -> Result<Launched> {
        Err(Error::unimplemented("exec"))
    }

    async fn observe(&self, _rec: &Record) -> Result<Observed> {
        Err(Error::unimplemented("observe"))
    }

    async fn delete(&self, _rec: &Record) -> Result<()> {
        Err(Error::unimplemented("delete"))
    }
}
