//! Requests to an object store's server in its own protocol, for what a backup never asks.

use anyhow::{Result, ensure};
use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential};
use object_store::client::{HttpConnector, HttpRequest, HttpRequestBody, ReqwestConnector};

/// Who signs a request.
#[derive(Debug, Clone, Copy)]
pub enum Signer {
    /// Nobody.
    None,
    /// S3, in a region.
    S3 {
        /// Key id.
        id: &'static str,
        /// Secret key.
        secret: &'static str,
        /// The region.
        region: &'static str,
    },
    /// Azure, with the key of an account.
    Azure {
        /// Name of the account.
        account: &'static str,
        /// Its key.
        key: &'static str,
    },
}

/// Sends a request, which must succeed or, with 409, have been done before.
pub async fn send(method: &str, url: &str, body: impl Into<Vec<u8>>, signer: Signer) -> Result<()> {
    let body = body.into();
    let request = http::Request::builder().method(method).uri(url);
    let request = request.header("content-length", body.len()).header("content-type", "application/xml");
    let mut request: HttpRequest = request.body(HttpRequestBody::from(body))?;
    match signer {
        Signer::None => {
            request.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        }
        Signer::S3 { id, secret, region } => {
            let credential = AwsCredential { key_id: id.to_owned(), secret_key: secret.to_owned(), token: None };
            AwsAuthorizer::new(&credential, "s3", region).try_authorize(&mut request, None)?;
        }
        Signer::Azure { account, key } => {
            let credential = AzureCredential::AccessKey(AzureAccessKey::try_new(key)?);
            AzureAuthorizer::new(&credential, account).try_authorize(&mut request)?;
        }
    }
    let options = object_store::ClientOptions::new().with_allow_http(true);
    let answer = ReqwestConnector::default().connect(&options)?.execute(request).await?;
    let status = answer.status();
    let body = answer.into_body().bytes().await?;
    ensure!(status.is_success() || status == 409, "{method} {url}: {status}: {}", String::from_utf8_lossy(&body));
    Ok(())
}
