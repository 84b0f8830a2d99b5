//! `/v1/proxy`: which proxy the guest's connections go by.

use hyper::StatusCode;

use super::problem::Refusal;
use crate::control::shapes::{Code, Proxy as Shape, ProxyChange};
use crate::policy::credentials::CredentialsFile;
use crate::policy::proxy::{PacSource, ProxyMode, ProxySettings, Secret};
use crate::slow::proxy::Proxy;

/// What holds now.
pub fn shown(proxy: &Proxy) -> Shape {
    let (mode, settings) = proxy.settings();
    Shape {
        mode,
        http: settings.http.as_ref().map(ToString::to_string),
        https: settings.https.as_ref().map(ToString::to_string),
        bypass: settings.bypass.to_string(),
        pac: settings.pac.as_ref().map(ToString::to_string),
        pac_failure: settings.pac_failure,
        transparent_ports: settings.transparent.to_string(),
    }
}

/// What is to hold for new connections.
pub async fn set(proxy: &Proxy, body: &[u8]) -> Result<Shape, Refusal> {
    // An object by its names, and no list in their order.
    let object = serde_json::from_slice::<serde_json::Map<_, _>>(body);
    let change =
        object.and_then(|object| serde_json::from_value::<ProxyChange>(object.into())).map_err(|_| {
            // The body may hold a password, and what is wrong with it is not repeated.
            refusal(
                StatusCode::BAD_REQUEST,
                Code::Malformed,
                "the body is not as expected, like {\"http\": \"http://proxy:3128\"}",
            )
        })?;
    let (settings, script) = understood(proxy, change)?;
    proxy.set(ProxyMode::Manual, settings, script).await.map_err(|error| said("pac", &error))?;
    Ok(shown(proxy))
}

/// No proxy, for new connections.
pub async fn clear(proxy: &Proxy) -> Result<Shape, Refusal> {
    let (_, settings) = proxy.settings();
    let none = ProxySettings { transparent: settings.transparent, ..ProxySettings::default() };
    proxy.set(ProxyMode::None, none, None).await.map_err(|error| said("pac", &error))?;
    Ok(shown(proxy))
}

fn understood(proxy: &Proxy, change: ProxyChange) -> Result<(ProxySettings, Option<String>), Refusal> {
    let (_, current) = proxy.settings();
    let mut settings = ProxySettings {
        http: parsed("http", change.http)?,
        https: parsed("https", change.https)?,
        bypass: parsed("bypass", change.bypass)?.unwrap_or_default(),
        pac: parsed("pac", change.pac)?,
        pac_failure: change.pac_failure.unwrap_or_default(),
        transparent: parsed("transparent_ports", change.transparent_ports)?.unwrap_or(current.transparent),
        ..ProxySettings::default()
    };
    if let Some(text) = change.credentials {
        let known =
            CredentialsFile::parse(&Secret::new(text)).map_err(|error| said("credentials", &error))?;
        known.give_to(&mut settings);
    }
    if matches!(settings.pac, Some(PacSource::File(_))) != change.script.is_some() {
        return Err(said("script", &"is for a pac that is a path, and such a pac needs it"));
    }
    Ok((settings, change.script))
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
    name: &str,
    text: Option<String>,
) -> Result<Option<T>, Refusal> {
    text.map(|text| text.parse()).transpose().map_err(|error| said(name, &error))
}

fn said(name: &str, error: &dyn std::fmt::Display) -> Refusal {
    refusal(StatusCode::UNPROCESSABLE_ENTITY, Code::Specification, &format!("{name}: {error}"))
}

fn refusal(status: StatusCode, code: Code, detail: &str) -> Refusal {
    Refusal::new(status, code, detail)
}
