//! A list of globs, matched as one.
//!
//! In: globs that parsed. Out: whether a name or path matches any of them; an empty list matches nothing. `*` does
//! not stop at `/`: people write `/opt/*/python3*` and mean every depth.

use std::path::Path;

use globset::GlobMatcher;

#[derive(Clone, Debug, Default)]
pub struct Globs(Vec<GlobMatcher>);

impl Globs {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn matches(&self, name: impl AsRef<Path>) -> bool {
        self.0.iter().any(|glob| glob.is_match(name.as_ref()))
    }
}

impl PartialEq for Globs {
    fn eq(&self, other: &Self) -> bool {
        let texts = |globs: &Self| globs.0.iter().map(|m| m.glob().glob().to_owned()).collect::<Vec<_>>();
        texts(self) == texts(other)
    }
}

impl FromIterator<globset::Glob> for Globs {
    fn from_iter<I: IntoIterator<Item = globset::Glob>>(globs: I) -> Self {
        Self(globs.into_iter().map(|glob| glob.compile_matcher()).collect())
    }
}
