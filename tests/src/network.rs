//! Hosts of their own on this machine: network namespaces with a cable each to a switch in one more.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A switch with hosts. Needs to be root, and iproute2.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    hosts: usize,
}

/// Where the switch itself is reached, and whoever runs there.
pub const CENTRE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);
/// A second address of it: a store there can be out of reach for a host that everybody else can reach.
pub const STORE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 253);

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("ip is missing: install iproute2")?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

impl Network {
    /// With so many hosts.
    pub fn new(hosts: usize) -> Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("steward-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let this = Self { prefix, hosts };
        let centre = this.centre();
        ip(&format!("netns add {centre}"))?;
        ip(&format!("-n {centre} link set lo up"))?;
        ip(&format!("-n {centre} link add switch type bridge"))?;
        ip(&format!("-n {centre} addr add {CENTRE}/24 dev switch"))?;
        ip(&format!("-n {centre} addr add {STORE}/24 dev switch"))?;
        ip(&format!("-n {centre} link set switch up"))?;
        for host in 0..hosts {
            let (name, address) = (this.name(host), this.address(host));
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {centre} link add cable{host} type veth peer name eth0 netns {name}"))?;
            ip(&format!("-n {centre} link set cable{host} master switch up"))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} addr add {address}/24 dev eth0"))?;
            ip(&format!("-n {name} link set eth0 up"))?;
        }
        Ok(this)
    }

    fn centre(&self) -> String {
        format!("{}-centre", self.prefix)
    }

    /// How many hosts there are.
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// The namespace of a host.
    pub fn name(&self, host: usize) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// The address of a host.
    pub fn address(&self, host: usize) -> String {
        format!("10.77.0.{}", host + 1)
    }

    /// What a host sends to an address is lost from now on.
    pub fn cut(&self, host: usize, address: &str) -> Result<()> {
        ip(&format!("-n {} route add blackhole {address}/32", self.name(host)))
    }

    /// It arrives again.
    pub fn mend(&self, host: usize, address: &str) -> Result<()> {
        ip(&format!("-n {} route del blackhole {address}/32", self.name(host)))
    }

    /// Runs something at the switch, from where all hosts are reached.
    pub fn run<T: Send>(&self, body: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = PathBuf::from("/run/netns").join(self.centre());
        let run = || {
            let file = std::fs::File::open(&namespace).with_context(|| format!("open {}", namespace.display()))?;
            // This thread moves, and those that it starts begin where it is.
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))?;
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(body())
        };
        std::thread::scope(|scope| scope.spawn(run).join().map_err(|_| anyhow!("it panicked"))?)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let names = (0..self.hosts).map(|host| self.name(host)).chain([self.centre()]);
        for name in names {
            if let Err(error) = ip(&format!("netns del {name}")) {
                eprintln!("{error}");
            }
        }
    }
}
