//! What shows no secret, however it is read later: a configuration is printed, logged and kept where many may read it.

use super::{Error, FIELDS, SidecarConfig};

/// Refuses what may have one in it.
pub(super) fn check(config: &SidecarConfig) -> Result<(), Error> {
    if config.store.as_ref().is_some_and(|store| !is_plain_store(&store.url)) {
        let what = "is not such as s3://bucket/prefix, or file:///directory with three slashes, and nothing else: a user, a password or a query would be seen, and credentials have files and variables of their own";
        return Err(Error::Secret { field: "store.url", what });
    }
    let reached =
        [("etcd.endpoints", &config.etcd.endpoints), ("etcd.clusterEndpoints", &config.etcd.cluster_endpoints)];
    if let Some((field, _)) = reached.into_iter().find(|(_, urls)| !urls.iter().all(|url| is_plain_address(url))) {
        let what = "has one that is not http://host:port or https://host:port, such as https://127.0.0.1:2379: credentials have files and variables of their own";
        return Err(Error::Secret { field, what });
    }
    if config.etcd.user.as_ref().is_some_and(|user| user.contains(':')) {
        let what = "has a colon: give the name alone, and the password in the file of etcd.passwordFile";
        return Err(Error::Secret { field: "etcd.user", what });
    }
    let tree = serde_json::to_value(config).unwrap_or_default();
    let is_path = |field: &&str| PATHS.iter().any(|end| field.ends_with(end));
    let has_content = |field: &&str| {
        let value = tree.pointer(&format!("/{}", field.replace('.', "/")));
        value.and_then(serde_json::Value::as_str).is_some_and(is_content)
    };
    match FIELDS.into_iter().filter(is_path).find(has_content) {
        Some(field) => Err(Error::Secret { field, what: "has the content of a file: give its path" }),
        None => Ok(()),
    }
}

/// What fields that name files or directories end with.
const PATHS: [&str; 7] = ["etcdConfig", "cacert", "clientCa", "cert", "key", "passwordFile", "workDir"];

/// Whether it is what a file has, in place of the path of one.
pub fn is_content(path: &str) -> bool {
    path.contains(char::is_control) || path.contains("-----BEGIN") || path.trim_start().starts_with('{')
}

/// Whether a URL is `http://host:port` or `https://host:port` and nothing else.
pub fn is_plain_address(url: &str) -> bool {
    let url = url.trim();
    let Some(rest) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")) else { return false };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.rsplit_once(':') {
        // The colons of an address of six are within its brackets.
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (rest, None),
    };
    let of_six = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match of_six {
        Some(six) => six.bytes().all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte)),
        None => host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)),
    };
    !host.is_empty() && is_host && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Whether a URL of a store has a bucket and a prefix, or a directory, and nothing else.
pub fn is_plain_store(url: &str) -> bool {
    let lower = url.to_ascii_lowercase();
    if lower.contains(['?', '#', '\\']) || lower.contains("%3f") || lower.contains(char::is_control) {
        return false;
    }
    match lower.split_once("://") {
        // A directory may be called anything.
        Some(("file", path)) => path.starts_with('/'),
        Some((_, place)) => {
            let bucket = place.split('/').next().unwrap_or_default();
            let is_bucket = bucket.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._$".contains(&byte));
            // As if a query stood there.
            let has_pair = place.split([';', '&']).skip(1).any(|part| part.contains('='));
            !bucket.is_empty() && is_bucket && !has_pair
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "apiVersion: sidecar.etcd-steward.io/v1\nmember:\n  etcdConfig: /etc/etcd.yaml\n";

    #[test]
    fn what_may_have_a_secret_is_told_from_what_has_none() {
        for plain in ["http://a", "https://a-b.c_d:2379/", "http://[::1]:1", "http://127.0.0.1:65535", " https://a:1 "]
        {
            assert!(is_plain_address(plain), "{plain}");
        }
        for other in [
            "a:1",
            "ftp://a:1",
            "https://",
            "https://:1",
            "https://a:0",
            "https://a:65536",
            "https://u:p@a:1",
            "https:///u:p@a:1",
            "https://a:1/secret",
            "https://a:1?x",
            "https://u:secret%40a:1",
            "https://u:secret:1",
            "https:/a:1",
            "http://[::1",
            "http://a b",
        ] {
            assert!(!is_plain_address(other), "{other}");
        }
        for plain in ["s3://bucket", "s3://my.bucket_1/a/b@c/d e&f;g", "az://$root/x", "file:///a@b;c", "gs://b/"] {
            assert!(is_plain_store(plain), "{plain}");
        }
        for other in [
            "s3:///key:secret/b/p",
            "s3://key:secret@b/p",
            "s3://key%3Asecret%40b/p",
            "az://c/p;sig=secret",
            "az://c/p&sig=secret",
            "s3://",
            "file:user:secret@/tmp",
            "file:/tmp",
            "file://tmp",
            "bucket",
            "az://c/p?sig=secret",
            "az://c/p%3Fsig=secret",
            "s3://b:9000/p",
        ] {
            assert!(!is_plain_store(other), "{other}");
        }
        assert!(is_content("-----BEGIN PRIVATE KEY-----") && is_content("a\nb") && is_content(" {\"a\": 1}"));
        assert!(!is_content("/etc/my certificates/tls.key"));
    }

    #[test]
    fn credentials_in_urls_are_refused_and_not_repeated() {
        for (set, field) in [
            ("store.url=s3://key:hidden@bucket/a", "store.url"),
            ("store.url=az://container/a?sig=hidden", "store.url"),
            ("etcd.endpoints=http://a:1,https://root:hidden@b:2", "etcd.endpoints"),
            ("etcd.clusterEndpoints=hidden@b:2", "etcd.clusterEndpoints"),
            ("etcd.endpoints=https:///root:hidden@a:1", "etcd.endpoints"),
            ("etcd.endpoints=https:/root:hidden@a:1", "etcd.endpoints"),
            ("etcd.endpoints=https:\\/root:hidden@a:1", "etcd.endpoints"),
            ("etcd.endpoints=https://a:1#hidden", "etcd.endpoints"),
            ("store.url=s3:///key:hidden@bucket/a", "store.url"),
            ("store.url=s3:/key:hidden@bucket/a", "store.url"),
            ("store.url=az://container/a%3Fsig=hidden", "store.url"),
        ] {
            let refused = SidecarConfig::layered(Some(LEAST), |_| None, &[set.to_owned()]);
            let said = refused.map_err(|error| error.to_string());
            assert!(said.as_ref().is_err_and(|said| said.contains(field) && !said.contains("hidden")), "{said:?}");
        }
        for (yaml, set) in [
            ("etcd: {password: hidden}", "etcd.user=root"),
            ("store: {url: 's3://key:hidden@bucket/a'}\nsnapshots:\n  fullSchedule: x\n  deltas: 1", "etcd.user=root"),
            ("etcd: {user: root}", "etcd.password=hidden"),
            ("etcd: {user: root}", "etcd.password:hidden"),
            ("etcd: {user: root}", "hidden"),
        ] {
            let refused = SidecarConfig::layered(Some(&format!("{LEAST}\n{yaml}\n")), |_| None, &[set.to_owned()]);
            let said = refused.map_err(|error| error.to_string());
            assert!(said.as_ref().is_err_and(|said| !said.contains("hidden")), "{said:?}");
        }
        let key = "-----BEGIN PRIVATE KEY-----\nhidden";
        for set in [
            format!("etcd.key={key}"),
            "etcd.passwordFile={\"hidden\"".into(),
            "etcd.user=root:hidden".into(),
            "etcd.password:hidden==".into(),
            "password: hidden=".into(),
        ] {
            let refused = SidecarConfig::layered(Some(LEAST), |_| None, std::slice::from_ref(&set));
            let said = refused.map_err(|error| error.to_string());
            assert!(said.as_ref().is_err_and(|said| !said.contains("hidden")), "{said:?}");
        }
        let fine = ["store.url=file:///a@b".to_owned(), "etcd.endpoints=http://[::1]:2379".to_owned()];
        assert!(SidecarConfig::layered(Some(LEAST), |_| None, &fine).is_ok());
    }
}
