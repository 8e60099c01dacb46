//! Google's workload identity federation. A credentials file of type `external_account` names a token that somebody else gave
//! this machine, such as a Kubernetes cluster; Google's token service takes it for one of its own, which then may stand for
//! a service account.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use object_store::CredentialProvider;
use object_store::client::{HttpClient, HttpRequestBody};
use object_store::gcp::GcpCredential;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Mutex;

use super::environment::unusable;
use crate::{Error, Result, small_file};

/// The file decides where the machine's token is sent, and others may write the file: it goes to Google alone.
const TOKEN_URL: &str = "https://sts.googleapis.com/v1/token";
const IMPERSONATION_URL: &str = "https://iamcredentials.googleapis.com/v1/";
const SCOPE: &str = "https://www.googleapis.com/auth/devstorage.read_write";
/// One that ends sooner is renewed; while that fails it is used as long as a request may take.
const LEAST_LIFE: TimeDelta = TimeDelta::minutes(5);
const LAST_USE: TimeDelta = TimeDelta::minutes(1);
/// Where the service does not say, as its standard lets it.
const USUAL_LIFE_SECONDS: i64 = 3600;
const ATTEMPTS: u32 = 3;

#[derive(Debug, Deserialize)]
struct Account {
    audience: String,
    subject_token_type: String,
    token_url: String,
    service_account_impersonation_url: Option<String>,
    credential_source: Source,
}

#[derive(Debug, Deserialize)]
struct Source {
    file: PathBuf,
    #[serde(default)]
    format: Format,
}

#[derive(Debug, Default, Deserialize)]
struct Format {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    subject_token_field_name: String,
}

impl Account {
    /// `path` is for messages.
    fn parse(text: &[u8], path: &Path) -> Result<Self> {
        let place = path.display();
        // What serde says of a value may have it in.
        let account: Self = serde_json::from_slice(text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            let needed = "audience, subject_token_type, token_url and a credential_source with a file";
            Error::invalid(format!(
                "the secret {place} (line {line}, column {column}): an external_account needs {needed}"
            ))
        })?;
        if account.token_url != TOKEN_URL {
            return Err(Error::invalid(format!("the secret {place}: token_url must be {TOKEN_URL}")));
        }
        if account.service_account_impersonation_url.as_ref().is_some_and(|url| !url.starts_with(IMPERSONATION_URL)) {
            let what = format!("service_account_impersonation_url must begin with {IMPERSONATION_URL}");
            return Err(Error::invalid(format!("the secret {place}: {what}")));
        }
        Ok(account)
    }

    /// What is sent to the token service.
    fn exchange(&self, subject_token: &str) -> String {
        let scope = match self.service_account_impersonation_url {
            Some(_) => "https://www.googleapis.com/auth/cloud-platform",
            None => SCOPE,
        };
        url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange")
            .append_pair("requested_token_type", "urn:ietf:params:oauth:token-type:access_token")
            .append_pair("audience", &self.audience)
            .append_pair("scope", scope)
            .append_pair("subject_token_type", &self.subject_token_type)
            .append_pair("subject_token", subject_token)
            .finish()
    }
}

impl Source {
    /// The machine's token, out of what its file has.
    fn token(&self, text: &str) -> Result<String> {
        if self.format.kind != "json" {
            return Ok(text.trim().to_owned());
        }
        let name = &self.format.subject_token_field_name;
        let value: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
        let token = value[name].as_str().map(str::to_owned);
        token.ok_or_else(|| Error::invalid(format!("the token file {} has no field {name:?}", self.file.display())))
    }
}

#[derive(Deserialize)]
struct Exchanged {
    access_token: String,
    expires_in: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Impersonated {
    access_token: String,
    expire_time: DateTime<Utc>,
}

/// A token and until when it is good.
struct Current {
    /// The file that it was made by.
    account: Vec<u8>,
    credential: Arc<GcpCredential>,
    renew_at: DateTime<Utc>,
    until: DateTime<Utc>,
}

/// Exchanges the machine's token, again when it ends or the file changes.
pub(super) struct Federation {
    path: PathBuf,
    http: HttpClient,
    current: Mutex<Option<Current>>,
}

impl std::fmt::Debug for Federation {
    /// Tokens must not be in it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Federation").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Federation {
    /// Of a file, which must make sense now.
    pub(super) fn new(path: &str, http: HttpClient) -> Result<Self> {
        let path = PathBuf::from(path);
        Account::parse(&small_file::read(&path).map_err(Error::io("read the secret", path.display()))?, &path)?;
        Ok(Self { path, http, current: Mutex::default() })
    }

    async fn renew(&self, text: &[u8]) -> Result<Current> {
        let account = Account::parse(text, &self.path)?;
        let file = &account.credential_source.file;
        let subject = small_file::read_text(file).map_err(Error::io("read the token", file.display()))?;
        let subject = account.credential_source.token(&subject)?;
        let form = "application/x-www-form-urlencoded";
        let body = self.post(&account.token_url, form, None, account.exchange(&subject)).await?;
        let exchanged: Exchanged = understood(&account.token_url, &body)?;
        let (token, until) = match &account.service_account_impersonation_url {
            None => {
                let seconds = exchanged.expires_in.unwrap_or(USUAL_LIFE_SECONDS).clamp(0, 86_400);
                (exchanged.access_token, Utc::now() + TimeDelta::seconds(seconds))
            }
            Some(url) => {
                let ask = json!({"scope": [SCOPE], "lifetime": "3600s"}).to_string();
                let body = self.post(url, "application/json", Some(&exchanged.access_token), ask).await?;
                let impersonated: Impersonated = understood(url, &body)?;
                (impersonated.access_token, impersonated.expire_time)
            }
        };
        // One that is given for less is used for half of that: not each request must ask for another.
        let renew_at = (until - LEAST_LIFE).max(Utc::now() + (until - Utc::now()) / 2);
        let credential = Arc::new(GcpCredential { bearer: token });
        Ok(Current { account: text.to_owned(), credential, renew_at, until })
    }

    async fn post(&self, url: &str, kind: &str, bearer: Option<&str>, body: String) -> Result<Bytes> {
        let mut attempt = 0;
        loop {
            let mut request = http::Request::post(url).header("content-type", kind);
            if let Some(bearer) = bearer {
                request = request.header("authorization", format!("Bearer {bearer}"));
            }
            let request = request.body(HttpRequestBody::from(body.clone()));
            let request = request.map_err(|error| Error::invalid(format!("ask {url} for a token: {error}")))?;
            let failure = match self.http.execute(request).await {
                Err(error) => crate::error::chain(&error),
                Ok(response) => {
                    let status = response.status();
                    match response.into_body().bytes().await {
                        Ok(body) if status.is_success() => return Ok(body),
                        Ok(body) if !status.is_server_error() && status != 429 => {
                            return Err(Error::Denied { what: refusal(url, status, &body) });
                        }
                        Ok(_) => format!("it answers {status}"),
                        Err(error) => crate::error::chain(&error),
                    }
                }
            };
            attempt += 1;
            if attempt == ATTEMPTS {
                return Err(Error::Unanswered { what: format!("ask {url} for a token: {failure}") });
            }
            tokio::time::sleep(Duration::from_millis(300 << attempt)).await;
        }
    }
}

/// What a token service said when it refused.
fn refusal(url: &str, status: http::StatusCode, body: &[u8]) -> String {
    let said: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let texts = [&said["error"], &said["error_description"], &said["error"]["message"]];
    let texts: Vec<_> = texts.into_iter().filter_map(|text| text.as_str()).collect();
    let text: String = texts.join(": ").chars().take(300).collect();
    format!("{url} gives no token ({status}): {text}")
}

fn understood<'b, T: Deserialize<'b>>(url: &str, body: &'b [u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|_| Error::Unanswered { what: format!("{url} answers without a token") })
}

#[async_trait]
impl CredentialProvider for Federation {
    type Credential = GcpCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<GcpCredential>> {
        let read = small_file::read(&self.path).map_err(Error::io("read the secret", self.path.display()));
        let text = read.map_err(unusable)?;
        // Held over the exchange: requests that meet the same end ask once.
        let mut current = self.current.lock().await;
        let ours = current.as_ref().filter(|current| current.account == text);
        if let Some(fresh) = ours.filter(|current| Utc::now() < current.renew_at) {
            return Ok(fresh.credential.clone());
        }
        match self.renew(&text).await {
            Ok(renewed) => Ok(current.insert(renewed).credential.clone()),
            Err(error) => match ours.filter(|current| current.until - Utc::now() > LAST_USE) {
                Some(last) => {
                    tracing::warn!(%error, "the token cannot be renewed; the one at hand is good for a while");
                    Ok(last.credential.clone())
                }
                None => Err(unusable(error)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(token_url: &str, impersonation: &str) -> Vec<u8> {
        json!({
            "type": "external_account", "audience": "//iam.googleapis.com/projects/1/x&y", "token_url": token_url,
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "service_account_impersonation_url": impersonation,
            "credential_source": {"file": "/var/token", "format": {"type": "json", "subject_token_field_name": "t"}},
        })
        .to_string()
        .into_bytes()
    }

    #[test]
    fn the_machine_s_token_goes_to_google_alone() -> Result<()> {
        let path = Path::new("account.json");
        let good = format!("{IMPERSONATION_URL}projects/-/serviceAccounts/a:generateAccessToken");
        let parsed = Account::parse(&account(TOKEN_URL, &good), path)?;
        let sent = parsed.exchange("secret");
        assert!(
            sent.contains("audience=%2F%2Fiam.googleapis.com%2Fprojects%2F1%2Fx%26y&") && sent.ends_with("=secret")
        );
        for (token_url, impersonation) in [
            ("https://sts.googleapis.com.example.org/v1/token", good.as_str()),
            ("http://sts.googleapis.com/v1/token", &good),
            (TOKEN_URL, "https://example.org/https://iamcredentials.googleapis.com/v1/"),
        ] {
            let refused = Account::parse(&account(token_url, impersonation), path);
            assert!(refused.is_err_and(|error| error.to_string().contains("account.json")), "{token_url}");
        }
        assert!(Account::parse(b"{\"audience\": 5}", path).is_err());
        Ok(())
    }

    #[test]
    fn a_token_is_a_file_or_a_field_of_one() -> Result<()> {
        let mut source = Source { file: "/var/token".into(), format: Format::default() };
        assert_eq!(source.token("  abc\n")?, "abc");
        source.format = Format { kind: "json".into(), subject_token_field_name: "t".into() };
        assert_eq!(source.token(r#"{"t": "abc"}"#)?, "abc");
        assert!(source.token("hidden").is_err_and(|error| !error.to_string().contains("hidden")));
        Ok(())
    }

    #[test]
    fn a_refusal_says_what_the_service_said() {
        let text = refusal(
            "url",
            http::StatusCode::BAD_REQUEST,
            br#"{"error":"invalid_grant","error_description":"expired"}"#,
        );
        assert!(text.contains("400") && text.ends_with("invalid_grant: expired"), "{text}");
        let text = refusal("url", http::StatusCode::FORBIDDEN, br#"{"error":{"message":"no impersonation"}}"#);
        assert!(text.ends_with("no impersonation"), "{text}");
    }
}
