"""The page: what is on it, and which function answers which button."""

import os
from pathlib import Path

from video_panda_hf.assets import SHIPPED_CLIPS
from video_panda_hf.decoding import DecodeLimits
from video_panda_hf.explain import METHODS

from .talk import DECODE_LIMITS, Talker


TITLE = "Video-Panda"
EXAMPLES = [
    ("red_circle_left.mp4", "Which way does it move?"),
    ("blue_cross_upwards.mp4", "Describe the video."),
    ("green_square_right.mp4", "What shape is it?"),
]
NOTE = """FSRA and GSTRA sum up a frame and four frames: their maps do not depend on the question. The map of the
answer shows where its words come from, as if the question were the first one. It is a hint, not a proof."""
KEPT = 3600  # seconds that an upload and an idle conversation are kept
SWITCH_THEME = "() => { document.body.classList.toggle('dark'); }"


def build_demo(
    model,
    processor,
    *,
    name: str | None = None,
    limits: DecodeLimits = DECODE_LIMITS,
    max_new_tokens: int = 256,
    most_frames: int = 64,
    waiting: int = 32,
):
    r"""
    The demo: upload or record a clip or picture, ask about it, see what the model looked at.

    One question at a time is answered, in the order of arrival.

    Args:
        model (`VideoPandaForConditionalGeneration`):
            The model.
        processor (`VideoPandaProcessor`):
            Its processor.
        name (`str`, *optional*):
            The model's name on the page.
        limits (`DecodeLimits`, *optional*):
            What decoding one uploaded clip may cost. Defaults to `DECODE_LIMITS`, which are tighter than those of
            `decode_video`.
        max_new_tokens (`int`, *optional*, defaults to 256):
            Longest answer, in tokens.
        most_frames (`int`, *optional*, defaults to 64):
            The most frames that a visitor can choose.
        waiting (`int`, *optional*, defaults to 32):
            How many questions may wait. One more gets a message that the demo is busy.

    Returns:
        `gradio.Blocks`: its `launch()` serves the page.

    Raises:
        ImportError: without Gradio.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError('the demo needs Gradio: pip install "video-panda-hf[demo]"') from error

    talker = Talker(model, processor, limits, max_new_tokens)
    clip_size = model.config.vision_config.frames_per_clip

    def chosen(talk, video, picture, num_frames, start, end):
        """The conversation about what is chosen now: the one so far, or a new one."""
        file = video or picture
        if not file:
            raise ValueError("Upload or record a clip or a picture first, or take an example.")
        start, end = (None if picture and not video else value or None for value in (start, end))
        clip = (file, int(num_frames), start, end)
        return talk if talk is not None and talk.clip == clip else talker.begin(*clip)

    def ask(question, history, talk, video, picture, num_frames, start, end):
        """Yields the page while the answer comes in. What is wrong with a clip is a message in the conversation."""
        question, former = (question or "").strip(), talk
        if not question:
            yield history, talk, question
            return
        history = history if talk is not None else []
        said = {"role": "user", "content": question}
        yield [*history, said, {"role": "assistant", "content": "…"}], talk, ""
        try:
            talk = chosen(talk, video, picture, num_frames, start, end)
            history = history if talk is former else []
            for text in talker.answer(talk, question):
                yield [*history, said, {"role": "assistant", "content": text}], talk, ""
        except (OSError, ValueError) as error:  # a bad clip or setting; the message names it
            message = f"⚠️ {without_folders(error, video, picture)}"
            yield [*history, said, {"role": "assistant", "content": message}], talk, ""

    def explain(question, talk, video, picture, num_frames, start, end, method, ablation):
        try:
            talk = chosen(talk, video, picture, num_frames, start, end)
            asked = (question or "").strip() or (talk.questions or [""])[-1]
            if not asked:
                raise ValueError("Ask a question first.")
            explanation = talker.explain(talk, asked, method, ablation)
        except (OSError, ValueError) as error:
            return None, f"⚠️ {without_folders(error, video, picture)}", talk
        picture = explanation.sheet()
        return picture, f"**{asked}** {explanation.text}", talk

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as demo:
        talk = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            gr.Markdown(f"# {TITLE}\n{name or ''}")
            theme = gr.Button("🌓 Dark or light", size="sm", scale=0, min_width=160)
        with gr.Row():
            with gr.Column(scale=1):
                with gr.Tab("Clip"):
                    # With sound, because Gradio would otherwise run FFmpeg on the file before we have looked at it.
                    video = gr.Video(label="Clip", sources=["upload", "webcam"], include_audio=True, height=320)
                with gr.Tab("Picture"):
                    picture = gr.Image(label="Picture", sources=["upload", "webcam"], type="filepath", height=320)
                    # Gradio does not open it: what is wrong with it is ours to say.
                    picture.preprocess = lambda payload: payload and payload.path
                num_frames = gr.Slider(
                    clip_size, most_frames, min(8, most_frames), step=clip_size, label="Frames to look at in a clip"
                )
                with gr.Row():
                    start = gr.Number(None, label="From second", minimum=0)
                    end = gr.Number(None, label="To second", minimum=0)
            with gr.Column(scale=2):
                with gr.Tab("Conversation"):
                    chat = gr.Chatbot(label="Conversation", height=380, render_markdown=False, buttons=["copy"])
                    question = gr.Textbox(
                        label="Question", placeholder="What happens in the video?", submit_btn=True, stop_btn=True
                    )
                    clear = gr.Button("New conversation", size="sm")
                with gr.Tab("What it looked at"):
                    gr.Markdown(NOTE)
                    with gr.Row():
                        about = gr.Textbox(label="Question", placeholder="the last one of the conversation")
                        method = gr.Dropdown(list(METHODS), value="gradient", label="Map of the answer by")
                        ablation = gr.Checkbox(label="Answer also without FSRA and GSTRA")
                    show = gr.Button("Explain", variant="primary")
                    shown = gr.Image(
                        show_label=False,
                        type="pil",
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id="explanation",
                    )
                    answered = gr.Markdown()
        clip = [video, picture, num_frames, start, end]
        gr.Examples(
            [[str(SHIPPED_CLIPS / file), text] for file, text in EXAMPLES],
            [video, question],
            label="Example clips",
            cache_examples=False,
        )
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}
        answering = question.submit(
            ask, [question, chat, talk, *clip], [chat, talk, question], api_name="ask", **one_at_a_time
        )
        question.stop(None, cancels=[answering], api_visibility="private")
        show.click(
            explain,
            [about, talk, *clip, method, ablation],
            [shown, answered, talk],
            api_name="explain",
            **one_at_a_time,
        )
        video.input(lambda: None, None, picture, api_visibility="private")  # the newest upload is asked about
        picture.input(lambda: None, None, video, api_visibility="private")
        clear.click(lambda: ([], None), None, [chat, talk], api_visibility="private")
        theme.click(None, js=SWITCH_THEME, api_visibility="private")
    demo.queue(max_size=waiting)
    return demo


def without_folders(error: Exception, *files: str | None) -> str:
    """The message of an error, with the name of an uploaded file in place of where the server keeps it."""
    message = str(error)
    for file in filter(None, files):
        message = message.replace(str(file), Path(file).name)
    return message
