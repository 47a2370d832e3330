//! Chats to text by the model's own Jinja template.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A chat template, as `tokenizer_config.json` holds it.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

fn raise(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

impl ChatTemplate {
    /// From its source, with the special tokens that it may write.
    ///
    /// # Errors
    /// A sentence about a template that does not parse.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        // What `transformers` sets.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| format!("the chat template does not parse: {e}"))?;
        Ok(Self { environment: Arc::new(environment), bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The chat as text; with `add_generation_prompt`, up to where the assistant speaks next.
    ///
    /// # Errors
    /// What the template refuses, in its own words.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let template = self.environment.get_template(NAME).map_err(|e| e.to_string())?;
        let turn = |m: &Message| {
            Value::from_pairs([("role", m.role.clone()), ("content", m.content.clone())])
        };
        let values = context! {
            messages => messages.iter().map(turn).collect::<Vec<Value>>(),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        template.render(values).map_err(|e| format!("the chat template refuses: {e}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
        message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\n' }}{% endif %}";

    fn said(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    #[test]
    fn a_chat_is_rendered_as_python_renders_it() {
        let template = ChatTemplate::new(CHATML, "", "").unwrap();
        let text = template.render(&[said("user", " hi ")], true).unwrap();
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn a_template_that_refuses_says_why() {
        let template = ChatTemplate::new("{{ raise_exception('no system') }}", "", "").unwrap();
        let error = template.render(&[], false).unwrap_err();
        assert!(error.contains("no system"), "{error}");
        assert!(ChatTemplate::new("{% if", "", "").is_err());
    }
}
