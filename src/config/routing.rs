//! Routing rules: which options a container gets by its namespace, image and name.

use std::collections::BTreeMap;

use super::{Container, keys::Layer};

/// CRI: the image of a container as the pod names it (containerd internal/cri/annotations).
const CRI_IMAGE: &str = "io.kubernetes.cri.image-name";
/// CRI, containerd 2: the image of the pod's sandbox.
const CRI_SANDBOX_IMAGE: &str = "io.kubernetes.cri.podsandbox.image-name";
/// CRI: the name of the container inside its pod; a sandbox has none.
const CRI_NAME: &str = "io.kubernetes.cri.container-name";
/// CRI: the Kubernetes namespace of the pod.
const CRI_POD_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
/// nerdctl hands its own labels on as annotations of the spec; this is `--name`.
const NERDCTL_NAME: &str = "nerdctl/name";

/// Longest pattern that is taken. It bounds the work of a match by a constant for each character of the text.
pub(super) const PATTERN_MAX_BYTES: usize = 256;

/// What a pattern is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attribute {
    /// containerd's namespace: "k8s.io", "default", "moby", …
    Namespace,
    /// The Kubernetes namespace of the pod.
    PodNamespace,
    /// The image, as the client named it.
    Image,
    /// The container's name, or its id where it has none.
    Name,
}

impl Attribute {
    /// The attribute of that key in a `[[route]]`.
    pub(super) fn find(key: &str) -> Option<Self> {
        match key {
            "namespace" => Some(Self::Namespace),
            "pod_namespace" => Some(Self::PodNamespace),
            "image" => Some(Self::Image),
            "name" => Some(Self::Name),
            _ => None,
        }
    }

    fn of<'a>(self, container: &Container<'a>) -> Option<&'a str> {
        match self {
            Self::Namespace => Some(container.namespace),
            Self::PodNamespace => first(container.annotations, &[CRI_POD_NAMESPACE]),
            Self::Image => first(container.annotations, &[CRI_IMAGE, CRI_SANDBOX_IMAGE]),
            Self::Name => first(container.annotations, &[CRI_NAME, NERDCTL_NAME]).or(Some(container.id)),
        }
    }
}

fn first<'a>(annotations: &'a BTreeMap<String, String>, keys: &[&str]) -> Option<&'a str> {
    keys.iter()
        .find_map(|key| annotations.get(*key))
        .map(String::as_str)
        .filter(|value| !value.is_empty())
}

/// One `[[route]]`: all patterns must match.
#[derive(Debug, Default)]
pub(super) struct Route {
    pub(super) patterns: Vec<(Attribute, String)>,
    pub(super) options: Layer,
}

impl Route {
    /// Whether every pattern matches. A container without an attribute (an image under ctr) matches no pattern for it, not even `*`.
    pub(super) fn matches(&self, container: &Container<'_>) -> bool {
        self.patterns
            .iter()
            .all(|(attribute, pattern)| attribute.of(container).is_some_and(|text| glob(pattern, text)))
    }
}

/// Whether all of `text` matches `pattern`: `*` stands for any run of characters (also none, also `/`), `?` for one character, every
/// other character for itself.
///
/// When a character does not fit, only the last `*` is widened by one, so that nothing is tried twice: at most
/// `pattern.len() * text.len()` steps, and the length of a pattern is bounded where it is read.
pub(super) fn glob(pattern: &str, text: &str) -> bool {
    let (mut pattern, mut text) = (pattern.chars(), text.chars());
    // The pattern behind the last `*`, and the text from which that rest was tried.
    let mut retry = None;
    loop {
        let here = text.clone();
        match (pattern.next(), text.next()) {
            (None, None) => return true,
            (Some('*'), _) => {
                retry = Some((pattern.clone(), here.clone()));
                text = here;
            }
            (Some(wanted), Some(found)) if wanted == '?' || wanted == found => {}
            // A wider `*` would leave even less text.
            (Some(_), None) => return false,
            (_, Some(_)) => {
                let Some((rest, from)) = &mut retry else {
                    return false;
                };
                from.next();
                pattern = rest.clone();
                text = from.clone();
            }
        }
    }
}
