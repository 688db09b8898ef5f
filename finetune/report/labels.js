"use strict";
// Labels in the reader's language: English as written, Chinese where the browser prefers it. `#` stands for a
// number, `*` for any text.
// Text of the data, of the run and of messages stays as it is, by the kind of its element or translate="no".
const label = (() => {
  const CHINESE = {
    "Training report": "训练报告", "# runs compared": "# 个训练的对比", "Data preview": "数据预览",
    "complete": "已完成", "failed": "失败", "stopped": "已停止", "running": "进行中", "end unknown": "结束状态未知",
    "Complete after # steps.": "共 # 步，已完成。", "In progress: # of # steps are logged*.": "进行中：已记录 # / # 步*。",
    ", about * to go": "，约剩 *", "Ended early: # of # steps are logged.": "提前结束：已记录 # / # 步。",
    "Stopped by * after # of # steps. To resume: *": "被 * 停止，已完成 # / # 步。恢复训练：*",
    "# of # steps are logged. The run was killed, or runs on a host that this one cannot see.":
      "已记录 # / # 步。训练被杀死，或运行在本机看不到的主机上。",
    "loss": "损失", "evaluation loss": "留出损失", "steps": "步数",
    "supervised tokens/s": "计入损失的 token/秒", "time in steps": "训练步用时", "peak memory of a rank": "单 rank 峰值内存",
    "Run": "训练", "State": "状态", "Model": "模型",
    "Loss": "损失", "Learning rate": "学习率", "Gradient norm": "梯度范数",
    "Supervised tokens per second": "每秒计入损失的 token 数", "Peak memory of a rank": "单 rank 峰值内存",
    "Seconds per step": "每步秒数", "Model FLOPs utilization": "模型 FLOPs 利用率", "Loss by source": "按来源的损失",
    "Loss by answer of a conversation": "按对话中第几个回答的损失", "answer *": "第 * 个回答",
    "training": "训练", "evaluation": "评估", "*, evaluation": "*，评估",
    "step": "步", "tokens": "token", "time": "时间", "smooth": "平滑", "tokens seen": "已见 token",
    "seconds in steps": "训练步累计秒数", "dotted: a non-finite step": "点线：数值非有限的步",
    "dashed: resumed from a checkpoint": "虚线：从检查点恢复",
    "of neighbouring steps the lowest and highest are drawn": "相邻各步只画最低与最高值",
    "JavaScript is disabled: the curves need it.": "JavaScript 已禁用，无法绘制曲线。",
    "Answers before and after": "微调前后的回答", "Greedy decoding, at most # tokens each.*":
      "贪心解码，每个回答至多 # 个 token。*",
    " Time ran out: some are cut off; finetune report OUTPUT generates them in full.":
      "时间用完，有的回答被截断；用 finetune report OUTPUT 可以完整生成。",
    "before": "微调前", "after": "微调后", "in the data": "数据中的回答", "cut off": "已截断", "(empty)": "（空）",
    "None were made yet: * makes them.": "尚未生成：运行 * 生成。",
    "human": "用户", "model": "模型", "system": "系统", "tool": "工具", "text": "文本",
    "Plan and outcome": "计划与结果", "Plan and outcome: *": "计划与结果：*", "Planned": "计划", "Actual": "实际",
    "Steps": "步数", "Epochs": "轮数", "Tokens per step": "每步 token 数", "Tokens in total": "token 总数",
    "Supervised share": "计入损失的占比", "Trained parameters": "训练的参数",
    "Time in steps": "训练步用时", "Wall clock": "实际时间", "Non-finite steps": "数值非有限的步",
    "Resumed": "恢复训练", "Rows left out": "跳过的行", "Lines of metrics.jsonl": "metrics.jsonl 的行",
    "about #": "约 #", "# (# of the model's)": "#（模型的 #）", "The full plan": "完整计划", "ranks": "rank 数", "data": "数据", "held out": "留出集",
    "batches": "批次", "length": "长度", "precision": "精度", "attention": "注意力", "trained": "训练的",
    "frozen": "冻结的", "absent": "没有的",
    "Data": "数据", "Rows": "行", "Tokens": "token", "Lengths": "长度", "Repeated": "重复", "Source": "来源",
    "Spelled": "写有控制 token", "Format": "格式", "Limit": "上限", "Tokenizer": "分词器", "Examples": "样本", "Reason": "原因", "File": "文件",
    "Row": "行", "Status": "状态", "Row #": "第 # 行", "All # rows": "全部 # 行", "Examples by length": "样本长度分布",
    "# tokens": "# 个 token", "# tokens, # supervised (#)": "# 个 token，# 个计入损失（#）", "# tokens, # supervised":
      "# 个 token，# 个计入损失", "Sample rows": "样本行", "# more rows": "另外 # 行",
    "# rows, drawn at random with the seed of the run.": "# 行，以训练的随机种子抽取。",
    "Window # of #": "窗口 # / #", "# more characters are not shown here.": "另有 # 个字符未显示。",
    "kept": "保留", "cut": "截断", "split": "分窗", "dropped": "丢弃", "all": "全部", "Show": "显示",
    "context": "上下文", "supervised": "计入损失", "control token": "控制 token", "end of turn, supervised": "轮次结束 token（计入损失）",
    "supervised, input is another token": "计入损失，但输入是另一个 token", "fixed width": "等宽", "contents only": "只看内容",
    "Rows not kept whole: # (the first #)": "未完整保留的行：#（前 # 行）", "Rows not kept whole: #": "未完整保留的行：#",
    "Differences between the runs": "训练之间的差异",
    "None: all arguments, versions and fingerprints are equal.": "无：参数、版本与指纹全部相同。",
    "Arguments, versions and fingerprints": "参数、版本与指纹", "Arguments set for this run": "本次设置的参数",
    "Arguments left at their defaults": "保持默认的参数", "Versions and fingerprints": "版本与指纹",
    "Resolved DeepSpeed config": "解析后的 DeepSpeed 配置", "Notes": "说明", "Base model": "基座模型",
    "Base revision": "基座版本", "Base files": "基座文件", "Base weights": "基座权重", "Chat format": "对话格式",
    "Ranks": "rank 数", "Precision": "精度", "Attention": "注意力", "Batching": "批次形式",
    "Likely cause": "可能的原因", "Possible cause": "可能的原因之一", "What to do": "怎么办", "When": "时间",
    "Exit status": "退出状态", "Observed": "观察到", "Newest checkpoint": "最新检查点",
    "# secondary failures": "# 个次生失败", "End of the traceback": "回溯的末尾", "Statistics": "统计",
    "Lengths in tokens, and scripts": "长度（token）与文字", "Tokens by role": "按角色的 token", "Longest": "最长", "Letters": "文字",
    "Supervised": "计入损失", "Share": "占比", "Of all supervised": "占全部计入损失的",
    "Rows with the most supervised tokens": "计入损失的 token 最多的行", "Near-duplicates, the first": "近似重复，最先的几个",
    "Earlier row": "较早的行", "Similarity": "相似度", "Benchmark questions in the training data": "训练数据中的评测题目",
    "Benchmark": "评测", "Questions": "题数", "Of # words or more": "不少于 # 词", "In the data": "数据中出现", "First in": "最先出现于",
    "# of # rows hold # of the supervised tokens": "# / # 行占有 # 的计入损失的 token",
    "# of # training rows are near-duplicates of an earlier training row": "# / # 训练行与较早的训练行近似重复",
    "# of # held-out rows are near-duplicates of a training row": "# / # 留出行与训练行近似重复",
    "# of # held-out rows are near-duplicates of an earlier held-out row": "# / # 留出行与较早的留出行近似重复",
    "# of # benchmark questions are in the training data": "# / # 道评测题目出现在训练数据中",
  };
  const KINDS = "[translate], .text, .between, .reason, bdi, dd, td, pre, code, script, style";
  if (!/^zh\b/i.test(navigator.language)) return Object.assign((text) => text, { translate() {} });
  document.documentElement.lang = "zh";
  const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const marked = Object.entries(CHINESE).filter(([english]) => /[#*]/.test(english));
  const patterns = marked.map(([english, chinese]) => [new RegExp(`^${escaped(english).replace(/\\\*|#/g,
    (mark) => mark === "#" ? "([\\d,.%]+)" : "(.*?)")}$`, "s"), chinese]);
  const label = (text) => {
    if (Object.hasOwn(CHINESE, text)) return CHINESE[text];
    for (const [pattern, chinese] of patterns) {
      const found = pattern.exec(text);
      let place = 0;
      if (found) return chinese.replace(/[#*]/g, () => label(found[++place]));
    }
    return text;
  };
  const translate = (root) => {
    const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const node = texts.currentNode, text = node.data.trim().replace(/\s+/g, " ");
      const kind = node.parentElement.closest(KINDS)?.getAttribute("translate");
      if (text && (kind === undefined || kind === "yes") && label(text) !== text)
        node.data = node.data.replace(node.data.trim(), () => label(text));
    }
  };
  translate(document.body);
  return Object.assign(label, { translate });
})();
