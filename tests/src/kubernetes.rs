//! A real kube-apiserver on a real etcd.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::certificates::Certificates;
use crate::{eventually, free_port, program};

/// A running kube-apiserver; killed when dropped.
#[derive(Debug)]
pub struct ApiServer {
    child: Child,
    client: Client,
    certificates: Certificates,
}

/// Speaks to it as an administrator.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
}

const TOKEN: &str = "steward-administrator";

impl ApiServer {
    /// Starts one that keeps its objects in the etcd at that URL, and its own files under `dir`.
    pub async fn start(dir: &Path, etcd: &str) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let certificates = Certificates::issue(&dir.join("certs"))?;
        let (certificate, key) = certificates.server();
        let tokens = dir.join("tokens.csv");
        std::fs::write(&tokens, format!("{TOKEN},administrator,administrator,system:masters\n"))?;
        let port = free_port()?;
        let log = File::create(dir.join("kube-apiserver.log"))?;
        let flag = |name: &str, value: &dyn AsRef<Path>| format!("--{name}={}", value.as_ref().display());
        let child = Command::new(program("kubernetes", "kube-apiserver")?)
            .args([format!("--etcd-servers={etcd}"), format!("--secure-port={port}")])
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--authorization-mode=RBAC"])
            .args(["--service-cluster-ip-range=10.96.0.0/16", "--service-account-issuer=https://localhost"])
            .args([flag("tls-cert-file", &certificate), flag("tls-private-key-file", &key)])
            .args([flag("service-account-key-file", &certificate), flag("service-account-signing-key-file", &key)])
            .args([flag("token-auth-file", &tokens), flag("cert-dir", &dir.join("certs"))])
            // Nothing creates service accounts here.
            .arg("--disable-admission-plugins=ServiceAccount")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let ca = reqwest::Certificate::from_pem(&std::fs::read(certificates.ca())?)?;
        let http = reqwest::Client::builder().tls_certs_only([ca]).build()?;
        let server = Self { child, client: Client { http, url: format!("https://127.0.0.1:{port}") }, certificates };
        let ready = || async { server.client.send(reqwest::Method::GET, "/readyz", None).await };
        eventually(Duration::from_secs(180), ready).await?;
        Ok(server)
    }

    /// Writes a configuration as kubectl takes it, for an administrator in the namespace `default`.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        let (url, ca) = (&self.client.url, self.certificates.ca());
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}}],
            "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": ca}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
        });
        Ok(std::fs::write(path, config.to_string())?)
    }

    /// A client of it.
    pub fn client(&self) -> Client {
        self.client.clone()
    }
}

impl Client {
    async fn send(&self, method: reqwest::Method, path: &str, body: Option<(&str, &Value)>) -> Result<String> {
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.url)).bearer_auth(TOKEN);
        if let Some((content_type, body)) = body {
            request = request.header(http::header::CONTENT_TYPE, content_type).body(body.to_string());
        }
        let answer = request.send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        ensure!(status.is_success(), "{method} {path}: {status}: {text}");
        Ok(text)
    }

    /// Creates an object in a collection such as `/api/v1/namespaces`.
    pub async fn create(&self, collection: &str, object: &Value) -> Result<()> {
        self.send(reqwest::Method::POST, collection, Some(("application/json", object))).await.map(drop)
    }

    /// Reads an object.
    pub async fn get(&self, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.send(reqwest::Method::GET, path, None).await?)?)
    }

    /// Changes some fields of an object.
    pub async fn patch(&self, path: &str, fields: &Value) -> Result<()> {
        self.send(reqwest::Method::PATCH, path, Some(("application/merge-patch+json", fields))).await.map(drop)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
