//! What the fields of a configuration are called, on a command line and in the environment.

/// Every field, as `--set` names it. The environment has each as `SIDECAR_` and its path in capitals, such as
/// `SIDECAR_SNAPSHOTS_DELTA_PERIOD`.
pub const FIELDS: [&str; 42] = [
    "member.etcdConfig",
    "etcd.endpoints",
    "etcd.clusterEndpoints",
    "etcd.cacert",
    "etcd.cert",
    "etcd.key",
    "etcd.user",
    "etcd.passwordFile",
    "etcd.removeMembersAfter",
    "store.url",
    "snapshots.fullSchedule",
    "snapshots.deltaPeriod",
    "snapshots.deltaMaxBytes",
    "snapshots.fullBytesPerSecond",
    "retention.policy",
    "retention.maxBackups",
    "retention.deltas",
    "retention.period",
    "compaction.deltas",
    "compaction.workDir",
    "verification.schedule",
    "verification.workDir",
    "defragmentation.schedule",
    "defragmentation.leastFreeShare",
    "defragmentation.urgentFreeShare",
    "defragmentation.resolveNoSpace",
    "background.bytesPerSecond",
    "server.listen",
    "server.tls.cert",
    "server.tls.key",
    "server.tls.clientCa",
    "server.peers.cacert",
    "server.peers.cert",
    "server.peers.key",
    "server.insecure",
    "server.etcdWrapper",
    "server.openSnapshots",
    "safety.mayStartEmpty",
    "kubernetes.namespace",
    "kubernetes.heartbeatPeriod",
    "kubernetes.fullSnapshotLease",
    "kubernetes.deltaSnapshotLease",
];

/// The variable of a field.
pub fn variable(field: &str) -> String {
    let words = field.chars().flat_map(|letter| match letter {
        '.' => vec!['_'],
        letter if letter.is_ascii_uppercase() => vec!['_', letter],
        letter => vec![letter.to_ascii_uppercase()],
    });
    std::iter::once("SIDECAR_").flat_map(str::chars).chain(words).collect()
}

/// Variables that say other things.
const OTHER_VARIABLES: [&str; 5] = ["SIDECAR_CONFIG", "SIDECAR_URL", "SIDECAR_CACERT", "SIDECAR_CERT", "SIDECAR_KEY"];

/// Of these variables, those that are named like one of a field and are none: probably misspelt. They are not refused, for
/// somebody else may have made them. Kubernetes makes some for each service, such as one that is called like that.
pub fn misspelt(variables: impl Iterator<Item = String>) -> Vec<String> {
    let known: Vec<String> = FIELDS.iter().map(|field| variable(field)).collect();
    let is_of_service = |name: &str| name.contains("_SERVICE_") || name.ends_with("_PORT") || name.contains("_PORT_");
    let is_like_one = |name: &String| {
        name.starts_with("SIDECAR_")
            && !known.contains(name)
            && !OTHER_VARIABLES.contains(&name.as_str())
            && !is_of_service(name)
    };
    variables.filter(is_like_one).collect()
}
