//! What a client prints: one line of JSON, numbers only.

/// The members of a JSON object, without its braces.
pub fn members(test: &str, numbers: &[(&str, f64)]) -> String {
    let numbers = numbers.iter().map(|(name, value)| format!(", \"{name}\": {}", round(*value)));
    std::iter::once(format!("\"test\": \"{test}\"")).chain(numbers).collect()
}

/// Prints an object.
pub fn print(test: &str, numbers: &[(&str, f64)]) {
    println!("{{{}}}", members(test, numbers));
}

/// Three digits behind the point say more than any measurement knows.
fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
