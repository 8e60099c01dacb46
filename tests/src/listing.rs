//! An S3 server whose listings lag, or come in pages that the protocol allows and nobody expects.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};

use crate::proxy::{Fault, Message, Proxy, forward};

/// How listings come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// Each tells what the one so many before it should have told.
    Lags(usize),
    /// One object a page, empty pages between them, objects out of order, and each of them twice.
    Strange,
}

/// A proxy before the server on that port that lists so.
pub async fn before(port: u16, listing: Listing) -> Result<Proxy> {
    let answers: Arc<Mutex<HashMap<String, Vec<Message>>>> = Arc::default();
    let serve = move |request: Message| {
        let answers = answers.clone();
        let answered = async move {
            let query =
                request.line.split(' ').nth(1).and_then(|target| target.split_once('?')).map(|(_, query)| query);
            let query = query.filter(|query| query.contains("list-type=2")).map(str::to_owned);
            let Some(query) = query else { return forward(port, &request).await };
            match listing {
                Listing::Lags(by) => {
                    let now = forward(port, &request).await?;
                    let mut answers = answers.lock().map_err(|_| anyhow::anyhow!("the proxy panicked"))?;
                    let told = answers.entry(query).or_default();
                    told.push(now);
                    // At first it knows of nothing new either.
                    told.get(told.len().saturating_sub(by + 1)).cloned().context("no answer")
                }
                Listing::Strange => {
                    let token = query.split('&').find_map(|part| part.strip_prefix("continuation-token="));
                    let mut pages = match token {
                        Some(_) => Vec::new(),
                        None => pages(&forward(port, &request).await?)?,
                    };
                    let mut answers = answers.lock().map_err(|_| anyhow::anyhow!("the proxy panicked"))?;
                    let (id, page) = match token.and_then(|token| token.split_once('-')) {
                        Some((id, page)) => (id.to_owned(), page.parse::<usize>()?),
                        None => (answers.len().to_string(), 0),
                    };
                    if token.is_none() {
                        for (n, page) in pages.iter_mut().enumerate() {
                            let text = String::from_utf8_lossy(&page.body).replace("TOKEN", &format!("{id}-{}", n + 1));
                            page.body = text.into_bytes();
                        }
                        answers.insert(id.clone(), pages);
                    }
                    answers.get(&id).and_then(|pages| pages.get(page)).cloned().context("no such page")
                }
            }
        };
        Box::pin(answered) as std::pin::Pin<Box<dyn Future<Output = Result<Message>> + Send>>
    };
    Proxy::start(Arc::new(serve), Arc::new(|_, _| Fault::None)).await
}

/// Cuts an answer into pages; the token in each is to be filled in.
fn pages(answer: &Message) -> Result<Vec<Message>> {
    let text = String::from_utf8(answer.body.clone())?;
    let Some((head, rest)) = text.split_once("<Contents>") else { return Ok(vec![answer.clone()]) };
    let (contents, tail) = rest.rsplit_once("</Contents>").context("no end of contents")?;
    let mut objects: Vec<&str> = contents.split("</Contents><Contents>").collect();
    ensure!(objects.len() == text.matches("<Contents>").count(), "the answer is written otherwise: {text}");
    objects.reverse();
    let twice = objects.iter().flat_map(|object| [Some(*object), None, Some(*object)]);
    let objects: Vec<Option<&str>> = twice.collect();
    let last = objects.len().saturating_sub(1);
    let page = |(n, object): (usize, Option<&str>)| {
        let content = object.map(|object| format!("<Contents>{object}</Contents>")).unwrap_or_default();
        let whole = format!("{head}{content}{tail}");
        let more = "<IsTruncated>true</IsTruncated><NextContinuationToken>TOKEN</NextContinuationToken>";
        let whole = if n < last { whole.replace("<IsTruncated>false</IsTruncated>", more) } else { whole };
        Message { body: whole.into_bytes(), ..answer.clone() }
    };
    Ok(objects.into_iter().enumerate().map(page).collect())
}
