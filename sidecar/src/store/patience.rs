//! Waits as long as a server asks for. The library that retries does not look at what it says.

use std::time::Duration;

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};

/// What is asked for beyond this is not waited for: the loops above have patience of their own.
const MOST: Duration = Duration::from_secs(20);

/// Makes clients that wait when they are told to.
#[derive(Debug, Default)]
pub(super) struct Patient(ReqwestConnector);

impl HttpConnector for Patient {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service(self.0.connect(options)?)))
    }
}

#[derive(Debug)]
struct Service(HttpClient);

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let response = self.0.execute(request).await?;
        let is_busy = matches!(response.status().as_u16(), 429 | 503);
        let asked = response.headers().get("retry-after").filter(|_| is_busy);
        if let Some(wait) = asked.and_then(|value| value.to_str().ok()).and_then(seconds) {
            tracing::debug!(?wait, "the store asks to wait");
            tokio::time::sleep(wait).await;
        }
        Ok(response)
    }
}

/// Dates are not understood; who sends one is retried as usual.
fn seconds(text: &str) -> Option<Duration> {
    text.trim().parse().ok().map(|seconds| Duration::from_secs(seconds).min(MOST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_understood_and_bounded() {
        assert_eq!(seconds("5"), Some(Duration::from_secs(5)));
        assert_eq!(seconds(" 100000 "), Some(MOST));
        assert_eq!(seconds("Wed, 21 Oct 2026 07:28:00 GMT"), None);
        assert_eq!(seconds("-1"), None);
    }
}
