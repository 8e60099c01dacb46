//! An emulator of Google's store, and what lies between it and the client: fake-gcs-server speaks the JSON API for what is
//! written, the client the XML API, which is what Google's own server speaks too. Reads and listings go through as they are.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::direct::{self, Signer};
use crate::proxy::{Fault, Message, Proxy, forward};
use crate::store::Store;
use crate::{eventually, free_port, program};

/// A running server with its translator; killed when dropped.
pub struct FakeGcs {
    child: Child,
    port: u16,
    proxy: Proxy,
}

impl FakeGcs {
    /// Starts a server that keeps its objects in memory, with one bucket.
    pub async fn start(log: &Path, bucket: &str) -> Result<Self> {
        let port = free_port()?;
        let log = File::create(log)?;
        let address = format!("127.0.0.1:{port}");
        let child = Command::new(program("fake-gcs", "fake-gcs-server")?)
            .args(["-scheme", "http", "-host", "127.0.0.1", "-port", &port.to_string(), "-backend", "memory"])
            .args(["-public-host", &address, "-external-url", &format!("http://{address}")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let translator = Arc::new(Translator { port, uploads: Mutex::default() });
        let serve = translator.clone();
        let proxy = Proxy::start(
            Arc::new(move |request| {
                let translator = serve.clone();
                Box::pin(async move { translator.answer(request).await })
            }),
            Arc::new(|_, _| Fault::None),
        )
        .await?;
        let started = Self { child, port, proxy };
        let create = || async {
            let body = format!("{{\"name\":\"{bucket}\"}}");
            let headers = [("content-type", "application/json"), ("host", address.as_str())];
            let request = Message {
                line: "POST /storage/v1/b?project=test HTTP/1.1".into(),
                ..Message::answer(0, &headers, body)
            };
            let answer = forward(port, &request).await?;
            ensure!([200, 409].contains(&answer.status()), "create bucket: {}", answer.line);
            Ok(())
        };
        eventually(Duration::from_secs(180), create).await?;
        Ok(started)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.proxy.port()
    }

    /// Sends a request of the JSON API.
    pub async fn send(&self, method: &str, target: &str, body: &str) -> Result<()> {
        let url = format!("http://127.0.0.1:{}/storage/v1/{target}", self.port);
        direct::send(method, &url, body, Signer::None).await
    }

    /// A prefix in its bucket, `bucket/prefix`.
    pub fn store(&self, place: &str) -> Store {
        let host = format!("127.0.0.1:{}", self.proxy.port());
        Store { url: format!("gs://{place}"), environment: vec![("STORAGE_EMULATOR_HOST".to_owned(), host)] }
    }
}

impl Drop for FakeGcs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Parts of an upload by number.
type Parts = BTreeMap<u32, Vec<u8>>;

struct Translator {
    port: u16,
    uploads: Mutex<HashMap<String, Parts>>,
}

impl Translator {
    fn uploads(&self) -> std::sync::MutexGuard<'_, HashMap<String, Parts>> {
        self.uploads.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn ask(&self, mut request: Message) -> Result<Message> {
        request.headers.retain(|(name, _)| name != "host");
        request.headers.push(("host".to_owned(), format!("127.0.0.1:{}", self.port)));
        forward(self.port, &request).await
    }

    async fn answer(&self, request: Message) -> Result<Message> {
        let mut words = request.line.split(' ');
        let (method, target) =
            (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let query: HashMap<&str, &str> =
            query.split('&').filter_map(|pair| pair.split_once('=').or(Some((pair, "")))).collect();
        let Some((bucket, object)) = path.trim_start_matches('/').split_once('/') else {
            return self.ask(request).await;
        };
        let lost = || Message::answer(404, &[], "<Error><Code>NoSuchUpload</Code></Error>");
        match (method.as_str(), query.get("uploadId"), query.get("partNumber")) {
            ("POST", None, _) if query.contains_key("uploads") => {
                let id = format!("upload-{:016x}", rand::random::<u64>());
                self.uploads().insert(id.clone(), Parts::new());
                let xml = format!(
                    "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
                );
                Ok(Message::answer(200, &[], xml))
            }
            ("PUT", Some(id), Some(number)) => {
                let etag = format!("\"part-{number}-{}\"", request.body.len());
                let number = number.parse()?;
                let taken = self.uploads().get_mut(*id).map(|parts| parts.insert(number, request.body));
                Ok(taken.map_or_else(lost, |_| Message::answer(200, &[("etag", &etag)], "")))
            }
            ("POST", Some(id), _) => {
                let Some(parts) = self.uploads().remove(*id) else { return Ok(lost()) };
                let content = parts.into_values().flatten().collect();
                let answer = self.upload(bucket, object, &request, content).await?;
                if answer.status() != 200 {
                    return Ok(answer);
                }
                let etag = answer.header("etag").unwrap_or_default().to_owned();
                let generation = answer.header("x-goog-generation").unwrap_or_default().to_owned();
                let xml = format!("<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>");
                Ok(Message::answer(200, &[("x-goog-generation", &generation)], xml))
            }
            ("DELETE", Some(id), _) => {
                Ok(self.uploads().remove(*id).map_or_else(lost, |_| Message::answer(204, &[], "")))
            }
            ("PUT", None, _) => {
                let content = match request.header("x-goog-copy-source") {
                    None => request.body.clone(),
                    Some(source) => {
                        let line = format!("GET /{} HTTP/1.1", source.trim_start_matches('/'));
                        let got = self.ask(Message { line, ..Message::default() }).await?;
                        if got.status() != 200 {
                            return Ok(got);
                        }
                        got.body
                    }
                };
                self.upload(bucket, object, &request, content).await
            }
            _ => self.ask(request).await,
        }
    }

    /// The JSON API's simple upload, with the condition that the request had.
    async fn upload(&self, bucket: &str, object: &str, request: &Message, content: Vec<u8>) -> Result<Message> {
        let condition = request.header("x-goog-if-generation-match");
        let condition = condition.map(|number| format!("&ifGenerationMatch={number}")).unwrap_or_default();
        let name = object.replace('/', "%2F");
        let target = format!("/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}{condition}");
        let headers = [("content-type", "application/octet-stream")];
        let line = format!("POST {target} HTTP/1.1");
        let answer = self.ask(Message { line, ..Message::answer(0, &headers, content) }).await?;
        if answer.status() != 200 {
            return Ok(Message::answer(answer.status(), &[], answer.body));
        }
        let said: serde_json::Value = serde_json::from_slice(&answer.body)?;
        let etag = format!("\"{}\"", said["md5Hash"].as_str().context("no md5Hash")?);
        let generation = said["generation"].as_str().context("no generation")?.to_owned();
        Ok(Message::answer(200, &[("etag", &etag), ("x-goog-generation", &generation)], ""))
    }
}
