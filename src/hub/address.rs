//! Addresses: which host one leads to, and where a redirect leads.

use ureq::http::Uri;

/// Scheme, host and port.
pub(super) type Origin = (String, String, u16);

/// An origin for people.
pub(super) fn show((scheme, host, port): &Origin) -> String {
    match (scheme.as_str(), port) {
        ("http", 80) | ("https", 443) => format!("{scheme}://{host}"),
        _ => format!("{scheme}://{host}:{port}"),
    }
}

pub(super) fn origin(uri: &Uri) -> Option<Origin> {
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let default = match scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let host = uri.host().filter(|host| !host.is_empty())?.to_ascii_lowercase();
    Some((scheme, host, uri.port_u16().unwrap_or(default)))
}

/// The origin of a hub's address; `None` for what is no such address, rather than one that was not meant.
pub(super) fn endpoint_origin(text: &str) -> Option<Origin> {
    let uri: Uri = text.parse().ok()?;
    let authority = uri.authority()?.as_str();
    // A port that is no number would become the default one; a user's name is where a host is expected.
    let port = authority.rsplit_once(']').map_or(authority, |(_, rest)| rest).split_once(':').map(|(_, port)| port);
    let has_port = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    (has_port && !authority.contains('@') && !text.contains(['?', '#'])).then(|| origin(&uri))?
}

/// The address that a redirect from `base` leads to.
pub(super) fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    // A fragment is for browsers.
    let location = location.split('#').next().unwrap_or_default();
    let scheme = base.scheme_str()?;
    let absolute = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", base.authority()?)
    } else {
        location.to_owned()
    };
    let uri: Uri = absolute.parse().ok()?;
    origin(&uri).map(|_| uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let of = |text: &str| origin(&text.parse().unwrap());
        assert_eq!(of("https://Hub.co/a"), of("https://hub.co:443"));
        for other in ["http://hub.co", "https://hub.co:444", "https://hub.co.evil.org", "https://evil.org/hub.co"] {
            assert_ne!(of("https://hub.co"), of(other), "{other}");
        }
        assert_eq!(of("https://hub.co@evil.org").unwrap().1, "evil.org");
        assert_eq!(show(&of("https://hub.co/a").unwrap()), "https://hub.co");
        assert_eq!(show(&of("http://hub.co:443").unwrap()), "http://hub.co:443");
        assert_eq!(of("/a"), None);
        assert_eq!(of("ftp://hub.co"), None);
    }

    #[test]
    fn an_endpoint_is_an_address_and_nothing_else() {
        for text in
            ["https://hub.co", "http://localhost:8080", "https://hub.co/mirror", "http://[::1]:80", "http://[::1]"]
        {
            assert!(endpoint_origin(text).is_some(), "{text}");
        }
        for text in [
            "",
            " ",
            "hub.co",
            "hub.co:443",
            "localhost:8080",
            "https:/hub.co",
            "https:hub.co",
            "https://",
            "ftp://hub.co",
            "file:///tmp",
            "https://hub.co:",
            "https://hub.co:x",
            "https://hub.co:0",
            "https://hub.co:99999",
            "http://[::1]:99999",
            "https://me@hub.co",
            "https://me:pw@hub.co",
            "https://hub.co?a=b",
            "https://hub.co/#a",
            "https://hub co",
            "https://:443",
            "/hub.co",
        ] {
            assert!(endpoint_origin(text).is_none(), "{text}");
        }
    }

    #[test]
    fn redirects_are_relative_or_absolute() {
        let base: Uri = "https://hub.co:8/a/b".parse().unwrap();
        let of = |location| resolve(&base, location).map(|uri| uri.to_string());
        assert_eq!(of("/c?d=e#f").unwrap(), "https://hub.co:8/c?d=e");
        assert_eq!(of("//cdn.co/c").unwrap(), "https://cdn.co/c");
        assert_eq!(of("http://cdn.co/c").unwrap(), "http://cdn.co/c");
        assert_eq!(of("file:///etc/passwd"), None);
        assert_eq!(of(""), None);
    }
}
