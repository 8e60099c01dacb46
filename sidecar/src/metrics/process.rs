//! What the kernel counts of this process and its host.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Where the kernel counts what goes over the network,
const NETSTAT: &str = "/proc/self/net/netstat";
/// the pages of this process,
const STATM: &str = "/proc/self/statm";
/// and its time.
const STAT: &str = "/proc/self/stat";

pub(super) struct Process {
    transmitted: Gauge,
    received: Gauge,
    resident: Gauge,
    cpu: Counter<f64, AtomicU64>,
}

impl Process {
    /// Under the names that dashboards look for. The predecessor counts the first two up without `_total` in their names, which
    /// the library gives every counter.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let this = Self {
            transmitted: Gauge::default(),
            received: Gauge::default(),
            resident: Gauge::default(),
            cpu: Counter::default(),
        };
        registry.register(
            "etcdbr_network_transmitted_bytes",
            "Bytes that this host has sent",
            this.transmitted.clone(),
        );
        registry.register("etcdbr_network_received_bytes", "Bytes that this host has received", this.received.clone());
        registry.register("process_resident_memory_bytes", "Memory of this process", this.resident.clone());
        registry.register("process_cpu_seconds", "CPU time that this process has used", this.cpu.clone());
        this
    }

    /// What cannot be read stays as it was.
    pub(super) fn read(&self) {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        if let Some((received, transmitted)) = octets(&read(NETSTAT)) {
            self.received.set(received);
            self.transmitted.set(transmitted);
        }
        if let Some(bytes) = resident(&read(STATM), rustix::param::page_size()) {
            self.resident.set(bytes);
        }
        if let Some(seconds) = cpu_seconds(&read(STAT), rustix::param::clock_ticks_per_second()) {
            self.cpu.inner().store(seconds.to_bits(), Ordering::Relaxed);
        }
    }
}

/// Bytes received and sent, as the two lines `IpExt:` have it: names, and values in their order.
fn octets(netstat: &str) -> Option<(i64, i64)> {
    let mut lines = netstat.lines().filter(|line| line.starts_with("IpExt:"));
    let (names, values) = (lines.next()?.split_whitespace(), lines.next()?.split_whitespace());
    let fields: Vec<_> = names.zip(values).collect();
    let value = |wanted| fields.iter().find(|(name, _)| *name == wanted)?.1.parse().ok();
    Some((value("InOctets")?, value("OutOctets")?))
}

/// Bytes in memory: the second number is pages.
fn resident(statm: &str, page_size: usize) -> Option<i64> {
    let pages: i64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(i64::try_from(page_size).ok()?)
}

/// Seconds of CPU, of the program and of the kernel for it. Its name, in brackets, may have anything in it.
#[expect(clippy::cast_precision_loss, reason = "seconds, not a count")]
fn cpu_seconds(stat: &str, ticks_per_second: u64) -> Option<f64> {
    let mut after_name = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || after_name.next()?.parse::<u64>().ok();
    Some(ticks()?.checked_add(ticks()?)? as f64 / ticks_per_second.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        let netstat = "TcpExt: A\nTcpExt: 1\nIpExt: InNoRoutes InOctets OutOctets\nIpExt: 0 12 34\n";
        assert_eq!(octets(netstat), Some((12, 34)));
        assert_eq!(octets("IpExt: InOctets\nIpExt: x\n"), None);
        assert_eq!(resident("100 3 2 1 0 9 0\n", 4096), Some(3 * 4096));
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 1 2 3 4 150 50 6 7 20 0 1 0 9 9 9";
        assert!(cpu_seconds(stat, 100).is_some_and(|seconds| (seconds - 2.0).abs() < 1e-9));
        assert_eq!((resident("", 4096), cpu_seconds("7 (a", 100)), (None, None));
    }
}
