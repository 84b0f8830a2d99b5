//! Which proxies there are, and what the guest may not reach: from the options, the environment, and files that only the user
//! may read.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::options::FILE_MAX_BYTES;
use super::{ConfigError, Options, desktop};
use crate::policy::credentials::CredentialsFile;
use crate::policy::egress::{Rule, Rules};
use crate::policy::proxy::{PacSource, ProxyMode, ProxySettings, Secret};

/// What is said about proxies.
#[derive(Clone, Debug, Default)]
pub struct ProxyChoice {
    /// Where it came from.
    pub mode: ProxyMode,
    /// What holds.
    pub settings: ProxySettings,
    /// The configuration script, where it is a file.
    pub script: Option<String>,
}

impl ProxyChoice {
    /// What the options say, and the host's environment and desktop where these are to be asked.
    pub fn of(options: &Options, notes: &mut Vec<String>) -> Result<Self, ConfigError> {
        let said =
            options.proxy_http.is_some() || options.proxy_https.is_some() || options.proxy_pac.is_some();
        // Who names a proxy wants it.
        let mode = options.proxy.unwrap_or(if said { ProxyMode::Manual } else { ProxyMode::System });
        if said && mode != ProxyMode::Manual {
            return Err(ConfigError::Value(
                "--proxy-http, --proxy-https and --proxy-pac are for --proxy manual".into(),
            ));
        }
        let mut settings = match mode {
            ProxyMode::None => ProxySettings::default(),
            ProxyMode::Manual => ProxySettings {
                http: options.proxy_http.clone(),
                https: options.proxy_https.clone(),
                pac: options.proxy_pac.clone(),
                ..ProxySettings::default()
            },
            ProxyMode::System => {
                let (settings, more) = ProxySettings::from_environment(|name| std::env::var(name).ok());
                notes.extend(more);
                if settings.is_off() { desktop::settings(notes).unwrap_or(settings) } else { settings }
            }
        };
        if let Some(bypass) = &options.proxy_bypass {
            settings.bypass.clone_from(bypass);
        }
        settings.pac_failure = options.pac_failure.unwrap_or_default();
        settings.transparent = options.transparent_ports.clone().unwrap_or_default();
        if let Some(path) = &options.proxy_credentials_file {
            credentials_from(path)?.give_to(&mut settings);
        }
        let script = match &settings.pac {
            Some(PacSource::File(path)) => Some(read("--proxy-pac", path)?),
            _ => None,
        };
        Ok(Self { mode, settings, script })
    }
}

/// The rules about where the guest may go.
pub(super) fn rules(options: &Options) -> Result<Rules, ConfigError> {
    let rules: Result<Vec<Rule>, _> = options.egress.iter().map(|text| text.parse()).collect();
    rules
        .and_then(|rules| Rules::of_guest(rules, options.hostname.as_deref()))
        .map_err(|error| ConfigError::Value(format!("--egress {error}")))
}

/// On a command line anybody on this machine can read them.
pub(super) fn refuse_passwords(options: &Options) -> Result<(), ConfigError> {
    let told = [("proxy-http", &options.proxy_http), ("proxy-https", &options.proxy_https)];
    for (name, proxy) in told {
        if proxy.as_ref().is_some_and(|proxy| proxy.credentials.is_some()) {
            return Err(ConfigError::Value(format!(
                "--{name}: a password on a command line is there for all to read; put it into a file for \
                 --proxy-credentials-file"
            )));
        }
    }
    Ok(())
}

fn read(option: &str, path: &Path) -> Result<String, ConfigError> {
    open(option, path).and_then(|file| text_of(option, path, file))
}

fn open(option: &str, path: &Path) -> Result<File, ConfigError> {
    File::open(path)
        .map_err(|error| ConfigError::Value(format!("{option} {}: cannot be read ({error})", path.display())))
}

fn text_of(option: &str, path: &Path, file: File) -> Result<String, ConfigError> {
    let unreadable =
        |error| ConfigError::Value(format!("{option} {}: cannot be read ({error})", path.display()));
    let mut text = String::new();
    let read = file.take(FILE_MAX_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    if read as u64 > FILE_MAX_BYTES {
        return Err(ConfigError::Value(format!("{option} {}: is larger than 1 MiB", path.display())));
    }
    Ok(text)
}

/// The text of a file that nobody else may read: the file that is opened is the one that is looked at.
pub fn secret_of(option: &str, path: &Path) -> Result<Secret, ConfigError> {
    let file = open(option, path)?;
    let mode = file.metadata().map(|known| known.permissions().mode());
    if mode.is_ok_and(|mode| mode & 0o077 != 0) {
        let path = path.display();
        return Err(ConfigError::Value(format!("{option} {path}: others may read it; chmod 600 it")));
    }
    text_of(option, path, file).map(Secret::new)
}

/// The credentials in a file that nobody else may read.
fn credentials_from(path: &Path) -> Result<CredentialsFile, ConfigError> {
    let option = "--proxy-credentials-file";
    CredentialsFile::parse(&secret_of(option, path)?)
        .map_err(|error| ConfigError::Value(format!("{option} {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_others_may_read_is_refused_and_not_told() {
        let path = std::env::temp_dir().join(format!("hythe-credentials-{}", std::process::id()));
        std::fs::write(&path, "joe:hunter2\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let error = credentials_from(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600") && !error.contains("hunter2"), "{error}");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        let file = credentials_from(&path).unwrap();
        assert!(!format!("{file:?}").contains("hunter2"));
        std::fs::remove_file(&path).unwrap();
    }
}
