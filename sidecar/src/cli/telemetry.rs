//! What the program tells of itself: log lines on standard error, and, when built with the feature `otlp` and the environment
//! names a collector, spans of what it does.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use super::LogFormat;
use crate::Result;

/// Sends spans until it is ended.
#[derive(Debug, Default)]
pub(super) struct Spans {
    #[cfg(feature = "otlp")]
    provider: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

/// Begins to tell. To be called on the runtime, which sends the spans.
#[cfg_attr(not(feature = "otlp"), expect(clippy::unnecessary_wraps, reason = "spans may have nowhere to go"))]
pub(super) fn begin(format: LogFormat) -> Result<Spans> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,object_store=warn"));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match format {
        LogFormat::Text => Box::new(lines.with_ansi(std::io::stderr().is_terminal())),
        LogFormat::Json => Box::new(lines.json()),
    };
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter));
    #[cfg(feature = "otlp")]
    let (spans, subscriber) = {
        let (provider, layer) = spans()?.unzip();
        (Spans { provider }, subscriber.with(layer))
    };
    #[cfg(not(feature = "otlp"))]
    let spans = Spans::default();
    subscriber.init();
    // A line of the log like any other, wherever that goes.
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    Ok(spans)
}

impl Spans {
    /// Sends what has not been sent.
    #[cfg_attr(not(feature = "otlp"), expect(clippy::unused_self, reason = "there is nothing to send"))]
    pub(super) fn end(self) {
        #[cfg(feature = "otlp")]
        if let Some(Err(error)) = self.provider.map(|provider| provider.shutdown()) {
            tracing::warn!(%error, "the last spans could not be sent");
        }
    }
}

/// Where spans go, when the standard variables of OpenTelemetry say so; they also say how, and how the service is called.
#[cfg(feature = "otlp")]
fn spans<S>() -> Result<Option<(opentelemetry_sdk::trace::SdkTracerProvider, impl Layer<S>)>>
where
    S: tracing::Subscriber + for<'span> tracing_subscriber::registry::LookupSpan<'span>,
{
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    let named = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    if !named.iter().any(|name| std::env::var_os(name).is_some_and(|endpoint| !endpoint.is_empty())) {
        return Ok(None);
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().build();
    let exporter = exporter.map_err(|error| {
        crate::Error::invalid(format!("spans cannot be sent to what OTEL_EXPORTER_OTLP_ENDPOINT says: {error}"))
    })?;
    let named = ["OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"].iter().any(|name| std::env::var_os(name).is_some());
    let resource = Resource::builder();
    let resource = if named { resource } else { resource.with_service_name("etcd-sidecar") };
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("sidecar"));
    // What the exporter does to send spans must not make more of them.
    let ours = tracing_subscriber::filter::Targets::new().with_target("sidecar", tracing::Level::INFO);
    Ok(Some((provider, layer.with_filter(ours))))
}
