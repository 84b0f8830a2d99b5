//! The proxy of the user's desktop: KDE's, which is a file, and GNOME's, which its own program tells.
//!
//! Asked once, at the start, where the environment names no proxy. A desktop that cannot be asked has none.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::policy::bypass::Bypass;
use crate::policy::proxy::{ProxySettings, ProxyUrl, Scheme};

/// How long GNOME's program may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the desktop says, if it says something.
pub fn settings(notes: &mut Vec<String>) -> Option<ProxySettings> {
    let found = kde().or_else(gnome)?;
    notes.push("the proxy is the desktop's".into());
    Some(found)
}

fn kde() -> Option<ProxySettings> {
    let home = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")))?;
    of_kde(&std::fs::read_to_string(home.join("kioslaverc")).ok()?)
}

/// `kioslaverc`: `ProxyType` 1 is by hand, 2 a script.
fn of_kde(text: &str) -> Option<ProxySettings> {
    let mut inside = false;
    let mut of = |name: &str| {
        text.lines().find_map(|line| {
            if line.starts_with('[') {
                inside = line.trim() == "[Proxy Settings]";
            }
            let (key, value) = line.split_once('=').filter(|_| inside)?;
            (key.trim() == name && !value.trim().is_empty()).then(|| value.trim().to_string())
        })
    };
    let kind = of("ProxyType")?;
    let mut proxy = |name: &str| {
        // A space stands before the port, where programs have a colon.
        let text = of(name)?.replace(' ', ":");
        text.parse::<ProxyUrl>().ok()
    };
    let (http, https, socks) = (proxy("httpProxy"), proxy("httpsProxy"), proxy("socksProxy"));
    let settings = match kind.as_str() {
        "1" => ProxySettings {
            http: http.or_else(|| socks.clone()),
            https: https.or(socks),
            bypass: Bypass::read(&of("NoProxyFor").unwrap_or_default()).0,
            ..ProxySettings::default()
        },
        "2" => ProxySettings { pac: of("Proxy Config Script")?.parse().ok(), ..ProxySettings::default() },
        _ => return None,
    };
    (!settings.is_off()).then_some(settings)
}

fn gnome() -> Option<ProxySettings> {
    of_gnome(&|schema, key| {
        let mut child = Command::new("gsettings")
            .args(["get", schema, key])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let deadline = Instant::now() + PATIENCE;
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        // One that has ended already is not harmed.
        let _ = child.kill();
        let output = child.wait_with_output().ok().filter(|output| output.status.success())?;
        String::from_utf8(output.stdout).ok().map(|text| text.trim().to_string())
    })
}

/// The settings of `org.gnome.system.proxy`, as `gsettings get` prints values.
fn of_gnome(get: &dyn Fn(&str, &str) -> Option<String>) -> Option<ProxySettings> {
    const SCHEMA: &str = "org.gnome.system.proxy";
    let plain = |schema: &str, key: &str| {
        let value = get(schema, key)?;
        let value = value.trim_matches('\'').to_string();
        (!value.is_empty()).then_some(value)
    };
    let proxy = |part: &str, scheme: Scheme| {
        let schema = format!("{SCHEMA}.{part}");
        let (host, port) = (plain(&schema, "host")?, plain(&schema, "port")?);
        ProxyUrl::at(scheme, &format!("{host}:{port}")).ok()
    };
    let settings = match plain(SCHEMA, "mode")?.as_str() {
        "manual" => {
            let socks = proxy("socks", Scheme::Socks5h);
            let ignored = get(SCHEMA, "ignore-hosts").unwrap_or_default();
            let hosts: Vec<&str> = ignored.split('\'').skip(1).step_by(2).collect();
            ProxySettings {
                http: proxy("http", Scheme::Http).or_else(|| socks.clone()),
                https: proxy("https", Scheme::Http).or(socks),
                bypass: Bypass::read(&hosts.join(",")).0,
                ..ProxySettings::default()
            }
        }
        "auto" => {
            let source = plain(SCHEMA, "autoconfig-url")?;
            ProxySettings { pac: source.parse().ok(), ..ProxySettings::default() }
        }
        _ => return None,
    };
    (!settings.is_off()).then_some(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(proxy: Option<&ProxyUrl>) -> String {
        proxy.map(ToString::to_string).unwrap_or_default()
    }

    #[test]
    fn kdes_file_is_read() {
        let text = "[General]\nhttpProxy=http://wrong 1\n[Proxy Settings]\nNoProxyFor=localhost,corp.example\n\
                    ProxyType=1\nhttpProxy=http://proxy.corp 3128\nhttpsProxy=\nsocksProxy=\n";
        let settings = of_kde(text).unwrap();
        assert_eq!(shown(settings.http.as_ref()), "http://proxy.corp:3128");
        assert_eq!(settings.https, None);
        assert_eq!(settings.bypass.to_string(), "localhost,corp.example");
        assert!(of_kde("[Proxy Settings]\nProxyType=0\nhttpProxy=http://proxy.corp 3128\n").is_none());
        let script = "[Proxy Settings]\nProxyType=2\nProxy Config Script=http://wpad/proxy.pac\n";
        assert_eq!(of_kde(script).unwrap().pac.unwrap().to_string(), "http://wpad/proxy.pac");
    }

    #[test]
    fn gnomes_values_are_read() {
        let get = |schema: &str, key: &str| {
            let value = match (schema.rsplit('.').next().unwrap(), key) {
                ("proxy", "mode") => "'manual'",
                ("proxy", "ignore-hosts") => "['localhost', '10.0.0.0/8']",
                ("http", "host") => "'proxy.corp'",
                ("http", "port") => "8080",
                ("https", "port") => "0",
                _ => "''",
            };
            Some(value.to_string())
        };
        let settings = of_gnome(&get).unwrap();
        assert_eq!(shown(settings.http.as_ref()), "http://proxy.corp:8080");
        assert_eq!(settings.https, None);
        assert_eq!(settings.bypass.to_string(), "localhost,10.0.0.0/8");
        assert!(of_gnome(&|_, _| Some("'none'".to_string())).is_none());
        assert!(of_gnome(&|_, _| None).is_none());
    }
}
